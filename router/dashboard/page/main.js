// Assembles the page: the sign-in form or the dashboard, and the header.

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

/** Schedules one redraw per animation frame. */
function scheduleDraw() {
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(() => {
    isDrawing = false;
    draw();
  });
}

async function enter() {
  const wanted = new Store(scheduleDraw, (error) => leave(error.words));
  await wanted.start();
  store = wanted;
  openDashboard();
}

function leave(message = "") {
  store?.stop();
  store = null;
  draw = () => {};
  forgetKeys();
  openSignIn(message);
}

function openSignIn(message) {
  drawHeader();
  const form = signIn(enter, message);
  app.replaceChildren(form.node);
  form.focus();
}

function openDashboard() {
  const live = drawHeader();
  const notice = h("p", { class: "notice error", role: "alert" });
  const showNotice = (words) => {
    text(notice, words);
    show(notice, Boolean(words));
  };
  showNotice("");
  const devices = devicesPanel(store);
  const models = modelsPanel(store, planner(store, devices.mark, showNotice));
  const parts = [devices, models, feedPanel(store), playground(store)];
  const [, , feed, play] = parts; // the playground comes first on the page: a first visit is to try a model
  const node = h("main", { class: "dashboard" }, h("h1", { class: "unseen" }, "Embedyard"), notice,
    h("div", { class: "main-column" }, play.node, devices.node, models.node),
    h("div", { class: "side-column" }, feed.node));
  app.replaceChildren(node);
  draw = () => {
    for (const part of parts) part.update();
    set(node, "data-live", String(store.connection.live));
    live();
  };
  draw();
}

/** Draws the header in the current language; returns the function that updates the connection status. */
function drawHeader() {
  document.documentElement.lang = language();
  const [dashboard, api] = document.getElementById("nav").children;
  text(dashboard, t("nav.dashboard"));
  text(api, t("nav.api"));
  const status = h("span", { class: "live", role: "status" });
  const other = h("button", { type: "button", lang: language() === "en" ? "zh-CN" : "en", onclick: changeLanguage }, t("nav.other"));
  const out = hasKey() && store && h("button", { type: "button", onclick: () => leave() }, t("nav.signout"));
  tools.replaceChildren(...[store && status, other, out].filter(Boolean));
  return () => {
    const { live, retryAt } = store.connection;
    set(status, "data-live", String(live));
    const left = retryAt === null ? 0 : retryAt - now(); // 0 and below: the attempt is being made
    text(status, live ? t("live.on") : left > 0 ? t("live.off", { time: duration(left) }) : t("live.connecting"));
  };
}

function changeLanguage() {
  switchLanguage();
  if (store) openDashboard();
  else openSignIn();
  tools.querySelector("[lang]").focus(); // the button was recreated, in the other language
}

// Durations change without events: redraw every second while something is in progress, else with each poll.
setInterval(() => store && !document.hidden && (store.isActive() || !store.connection.live) && draw(), 1000);

if (isOpen || hasKey()) enter().catch((error) => openSignIn(error.status === 401 ? "" : error.words ?? error.message));
else openSignIn();
