// The playground's request as code. The key is a variable, so that copied code does not contain it.

import { h, text } from "./dom.js";
import { t } from "./words.js";

const OPENAI = ["model", "input", "dimensions"]; // fields of OpenAI's client
const LANGUAGES = { curl, Python: python, JavaScript: javascript };

function curl(url, body) {
  const json = JSON.stringify(body).replaceAll("'", "'\\''");
  return `curl ${url} \\\n  -H "Authorization: Bearer $API_KEY" \\\n  -H 'Content-Type: application/json' \\\n  -d '${json}'`;
}

/** Code for OpenAI's client; fields unknown to it go into extra_body. JSON strings are Python strings. */
function python(url, body) {
  if (!url.endsWith("/embeddings")) return pythonPost(url, body);
  const fields = Object.entries(body);
  const lines = fields.filter(([name]) => OPENAI.includes(name)).map(([name, value]) => `    ${name}=${pythonValue(value)},`);
  const extra = fields.filter(([name]) => !OPENAI.includes(name)).map(([name, value]) => `"${name}": ${pythonValue(value)}`);
  if (extra.length) lines.push(`    extra_body={${extra.join(", ")}},`);
  const base = url.replace(/\/embeddings$/, "");
  return `import os\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${base}", api_key=os.environ.get("API_KEY", "none"))\nanswer = client.embeddings.create(\n${lines.join("\n")}\n)\nprint(answer.data[0].${fieldOf(body)})`;
}

function pythonValue(value) {
  return value === true ? "True" : JSON.stringify(value);
}

/** Returns the field of an item that holds the output. */
function fieldOf({ outputs }) {
  return outputs ? "sparse_embedding" : "embedding";
}

/** Code without a client of its own: the fields are texts and lists, which Python writes as JSON does. */
function pythonPost(url, body) {
  const json = JSON.stringify(body, null, 4).replaceAll("\n", "\n    ");
  return `import os\nimport httpx\n\nanswer = httpx.post(\n    "${url}",\n    headers={"Authorization": f"Bearer {os.environ.get('API_KEY', 'none')}"},\n    json=${json},\n)\nprint(answer.json())`;
}

function javascript(url, body) {
  const [name, shown] = url.endsWith("/rerank") ? ["results", "results"] : ["data", url.endsWith("/embeddings") ? `data[0].${fieldOf(body)}` : "data"];
  return `const answer = await fetch("${url}", {\n  method: "POST",\n  headers: {\n    "Authorization": \`Bearer \${process.env.API_KEY}\`,\n    "Content-Type": "application/json",\n  },\n  body: JSON.stringify(${JSON.stringify(body, null, 2).replaceAll("\n", "\n  ")}),\n});\nconst { ${name} } = await answer.json();\nconsole.log(${shown});`;
}

export function snippets() {
  const code = h("pre", { id: "code", tabindex: "0", role: "tabpanel", "aria-labelledby": "tab-curl" });
  const copy = h("button", { type: "button", class: "small" }, t("do.copy"));
  let chosen = "curl";
  let call = ["", {}];
  const tabs = Object.keys(LANGUAGES).map((name) => h("button", {
    type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "code", onclick: () => choose(name),
  }, name));
  const bar = h("div", { role: "tablist", "aria-label": t("play.same"), class: "tabs" }, tabs);
  bar.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const names = Object.keys(LANGUAGES);
    choose(names[(names.indexOf(chosen) + step + names.length) % names.length]);
    tabs.find((tab) => tab.id === `tab-${chosen}`).focus();
  });
  copy.addEventListener("click", async () => {
    await copyText(code);
    text(copy, t("do.copied"));
    setTimeout(() => text(copy, t("do.copy")), 1500);
  });

  function choose(name) {
    chosen = name;
    draw();
  }
  function draw() {
    for (const tab of tabs) {
      const isChosen = tab.id === `tab-${chosen}`;
      tab.setAttribute("aria-selected", isChosen);
      tab.tabIndex = isChosen ? 0 : -1;
    }
    code.setAttribute("aria-labelledby", `tab-${chosen}`);
    text(code, LANGUAGES[chosen](...call));
  }
  draw();
  const node = h("div", { class: "snippets" }, h("h3", {}, t("play.same")), h("div", { class: "code-head" }, bar, copy), code);
  const update = (path, body) => {
    call = [location.origin + path, body];
    draw();
  };
  return { node, update };
}

/** Copies text. The clipboard API needs HTTPS or localhost; elsewhere uses selection and execCommand. */
export async function copyText(node) {
  if (navigator.clipboard) return navigator.clipboard.writeText(node.textContent).catch(() => select(node));
  select(node);
  document.execCommand("copy");
}

function select(node) {
  getSelection().selectAllChildren(node);
}
