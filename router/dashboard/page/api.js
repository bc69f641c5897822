// All requests of the page. The key is in sessionStorage: it is deleted with the tab, and sent nowhere else.

import { serverWords } from "./words.js";

const ADMIN_KEY = "embedyard.key";
const EMBED_KEY = "embedyard.embed_key";

/** An error response; `message` is the server's and has the remedy, `words` the same in the language of the page. Status 0: the server was not reached. */
export class ApiError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }

  get words() {
    return serverWords(this.code, this.message);
  }
}

/** Seconds that the server's clock is ahead of the browser's; its Date header has whole seconds. */
let skewSeconds = 0;

export function now() {
  return Date.now() / 1000 + skewSeconds;
}

export function hasKey() {
  return Boolean(sessionStorage.getItem(ADMIN_KEY));
}

export function setKey(key) {
  sessionStorage.setItem(ADMIN_KEY, key);
}

/** Sets a second key, for servers whose admin key may not embed. */
export function setEmbedKey(key) {
  sessionStorage.setItem(EMBED_KEY, key);
}

export function forgetKeys() {
  sessionStorage.removeItem(ADMIN_KEY);
  sessionStorage.removeItem(EMBED_KEY);
}

function bearer(path) {
  const own = path.startsWith("/v1/") && sessionStorage.getItem(EMBED_KEY);
  const key = own || sessionStorage.getItem(ADMIN_KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** Returns the raw response, whatever its status; throws ApiError only without one. */
export async function send(path, options = {}) {
  const headers = { ...bearer(path), ...options.headers };
  try {
    return await fetch(path, { cache: "no-store", ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(error.message, 0, "unreachable");
  }
}

async function checked(path, options) {
  const answer = await send(path, options);
  if (answer.ok) return answer;
  const detail = (await answer.json().catch(() => null))?.error;
  throw new ApiError(detail?.message ?? `HTTP ${answer.status}`, answer.status, detail?.code ?? "");
}

export async function get(path) {
  const answer = await checked(path);
  noteClock(answer);
  return answer.json();
}

export async function getText(path) {
  return (await checked(path)).text();
}

/** Returns the decoded body, the headers, and the duration measured in the browser. */
export async function post(path, body) {
  const started = performance.now();
  const answer = await checked(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  });
  const data = await answer.json();
  return { data, headers: answer.headers, seconds: (performance.now() - started) / 1000 };
}

function noteClock(answer) {
  const date = Date.parse(answer.headers.get("date") ?? "");
  if (Number.isNaN(date)) return;
  const measured = date / 1000 - Date.now() / 1000;
  skewSeconds = Math.abs(measured) < 2 ? 0 : measured;
}

/** Builds a path with a model id; slashes are not encoded. */
export function modelPath(modelId, verb) {
  return `/admin/models/${modelId.split("/").map(encodeURIComponent).join("/")}/${verb}`;
}
