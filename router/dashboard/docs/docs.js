// Swagger UI has its own dark side, which a class turns on.
const dark = matchMedia("(prefers-color-scheme: dark)");
const dress = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", dress);
dress();

const KEY = "embedyard.key"; // where the dashboard keeps it for this tab
const LANGUAGE = "embedyard.language"; // where it keeps the choice
const chosen = localStorage.getItem(LANGUAGE) ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
const isChinese = chosen === "zh";
const place = document.getElementById("swagger-ui");

const button = document.getElementById("language");
button.addEventListener("click", () => {
  localStorage.setItem(LANGUAGE, isChinese ? "en" : "zh");
  location.reload();
});
if (isChinese) {
  document.documentElement.lang = "zh-CN";
  document.getElementById("overview").textContent = "概览";
  button.textContent = "English";
  button.lang = "en";
  // React sets its labels again when it draws, so each change is looked at.
  new MutationObserver(() => translateLabels()).observe(place, { subtree: true, childList: true, characterData: true });
}

function translateLabels() {
  const walker = document.createTreeWalker(place, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const words = CHINESE_LABELS[walker.currentNode.nodeValue.trim()];
    if (words) walker.currentNode.nodeValue = words;
  }
}

/** Translates what the document says of its groups and routes. */
function translated(text) {
  const document = JSON.parse(text);
  document.info.description = CHINESE_INTRODUCTION;
  for (const tag of document.tags ?? []) tag.description = CHINESE[tag.description] ?? tag.description;
  for (const route of Object.values(document.paths)) {
    for (const operation of Object.values(route)) {
      operation.summary = CHINESE[operation.summary] ?? operation.summary;
      operation.description = CHINESE[operation.description?.replace(/\s+/g, " ").trim()] ?? operation.description;
    }
  }
  return JSON.stringify(document);
}

// validatorUrl null: Swagger UI would otherwise send the document to a validator on the internet.
window.ui = SwaggerUIBundle({
  url: "/docs/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  tryItOutEnabled: true,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
  responseInterceptor(response) {
    if (isChinese && new URL(response.url, location).pathname === "/docs/openapi.json" && response.ok) {
      response.text = translated(response.text);
      response.data = response.text;
    }
    return response;
  },
  onComplete() {
    const key = sessionStorage.getItem(KEY);
    if (key) window.ui.preauthorizeApiKey("BearerToken", key);
  },
});
