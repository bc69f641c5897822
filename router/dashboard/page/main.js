// Puts the page together: the door or the yard, and the tools in the header.

import { forgetKeys, hasKey, now } from "./api.js";
import { devicesPanel } from "./devices.js";
import { h, set, show, text } from "./dom.js";
import { feedPanel } from "./feed.js";
import { duration } from "./format.js";
import { modelsPanel } from "./models.js";
import { planner } from "./plan.js";
import { playground } from "./playground.js";
import { signIn } from "./signin.js";
import { Store } from "./store.js";
import { language, switchLanguage, t } from "./words.js";

const app = document.getElementById("app");
const tools = document.getElementById("tools");
const isOpen = document.documentElement.dataset.admin === "open";
let store = null;
let draw = () => {};
let isDrawing = false;

/** Many changes of one moment are drawn once. */
function changed() {
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(() => {
    isDrawing = false;
    draw();
  });
}

async function enter() {
  const wanted = new Store(changed, (error) => leave(error.message));
  await wanted.start();
  store = wanted;
  openYard();
}

function leave(message = "") {
  store?.stop();
  store = null;
  draw = () => {};
  forgetKeys();
  openDoor(message);
}

function openDoor(message) {
  dress();
  const door = signIn(enter, message);
  app.replaceChildren(door.node);
  door.focus();
}

function openYard() {
  const live = dress();
  const notice = h("p", { class: "notice error", role: "alert" });
  const tell = (words) => {
    text(notice, words);
    show(notice, Boolean(words));
  };
  tell("");
  const devices = devicesPanel(store);
  const models = modelsPanel(store, planner(store, devices.mark, tell));
  const parts = [devices, models, feedPanel(store), playground(store)];
  const [, , feed, play] = parts;
  const node = h("main", { class: "yard" }, h("h1", { class: "unseen" }, "Embedyard"), notice,
    h("div", { class: "main-column" }, devices.node, models.node, play.node),
    h("div", { class: "side-column" }, feed.node));
  app.replaceChildren(node);
  draw = () => {
    for (const part of parts) part.update();
    set(node, "data-live", String(store.connection.live));
    live();
  };
  draw();
}

/** The header, in the language of the page; returns what keeps the connection's light right. */
function dress() {
  document.documentElement.lang = language();
  const [yard, api] = document.getElementById("nav").children;
  text(yard, t("nav.yard"));
  text(api, t("nav.api"));
  const light = h("span", { class: "live", role: "status" });
  const other = h("button", { type: "button", lang: language() === "en" ? "zh-CN" : "en", onclick: changeLanguage }, t("nav.other"));
  const out = hasKey() && store && h("button", { type: "button", onclick: () => leave() }, t("nav.signout"));
  tools.replaceChildren(...[store && light, other, out].filter(Boolean));
  return () => {
    const { live, retryAt } = store.connection;
    set(light, "data-live", String(live));
    const time = retryAt === null ? "" : duration(Math.max(0, retryAt - now()));
    text(light, live ? t("live.on") : retryAt === null ? t("live.connecting") : t("live.off", { time }));
  };
}

function changeLanguage() {
  switchLanguage();
  if (store) openYard();
  else openDoor();
  tools.querySelector("[lang]").focus(); // it was made anew, in the other language
}

// Durations grow while nothing happens: quickly while something is on its way, else with each poll.
setInterval(() => store && !document.hidden && (store.isActive() || !store.connection.live) && draw(), 1000);

if (isOpen || hasKey()) enter().catch((error) => openDoor(error.status === 401 ? "" : error.message));
else openDoor();
