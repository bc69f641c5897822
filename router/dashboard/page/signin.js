// The sign-in form.

import { forgetKeys, setKey } from "./api.js";
import { h, text } from "./dom.js";
import { t } from "./words.js";

/** `enter()` resolves when the server accepts the key, and rejects with its error. */
export function signIn(enter, message = "") {
  const key = h("input", { id: "key", type: "password", autocomplete: "current-password", required: true, "aria-describedby": "key-hint" });
  const refusal = h("p", { class: "error", role: "alert" }, message);
  const button = h("button", { type: "submit", class: "primary" }, t("signin.button"));
  const node = h("main", { class: "signin" }, h("form", { class: "panel" },
    h("h1", {}, t("signin.title")), h("label", { for: "key" }, t("signin.key")), key,
    h("p", { id: "key-hint", class: "quiet small" }, t("signin.hint")), refusal, button));
  node.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    setKey(key.value.trim());
    try {
      await enter();
    } catch (error) {
      forgetKeys();
      text(refusal, error.status === 401 ? t("signin.wrong") : error.words ?? error.message);
      button.disabled = false;
      key.select();
    }
  });
  return { node, focus: () => key.focus() };
}
