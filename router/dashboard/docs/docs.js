// Swagger UI has its own dark side, which a class turns on.
const dark = matchMedia("(prefers-color-scheme: dark)");
const dress = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", dress);
dress();

const KEY = "embedyard.key"; // where the dashboard keeps it for this tab

// validatorUrl null: Swagger UI would otherwise send the document to a validator on the internet.
window.ui = SwaggerUIBundle({
  url: "/docs/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  tryItOutEnabled: true,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
  onComplete() {
    const key = sessionStorage.getItem(KEY);
    if (key) window.ui.preauthorizeApiKey("BearerToken", key);
  },
});
