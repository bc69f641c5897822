// Reads server-sent events with fetch, because EventSource cannot send an Authorization header.

import { ApiError, send } from "./api.js";

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 15000;
const SILENCE_MS = 40000; // the server sends a keep-alive every 15 s

/** Parses an event stream into messages {id, event, data}, incrementally. */
export function parser(onMessage) {
  let rest = "";
  let message = {};
  const line = (content) => {
    if (content === "") {
      if (message.data !== undefined) onMessage(message);
      message = {};
      return;
    }
    const colon = content.indexOf(":");
    if (colon <= 0) return; // a comment
    const field = content.slice(0, colon);
    const value = content.slice(colon + 1).replace(/^ /, "");
    message[field] = field === "data" && message.data !== undefined ? `${message.data}\n${value}` : value;
  };
  return (chunk) => {
    const lines = (rest + chunk).split("\n");
    rest = lines.pop();
    for (const each of lines) line(each.replace(/\r$/, ""));
  };
}

/**
 * Follows a stream until `stop()`. Reconnects with the last event's id when it ends, is silent, or fails.
 *
 * handlers: onOpen(), onMessage({event, data}), onWait(seconds until the next attempt), onRefused(ApiError).
 */
export function follow(path, lastEventId, handlers) {
  let stopped = false;
  let wait = FIRST_WAIT_MS;
  let abort = new AbortController();
  let wake = () => {};

  async function once() {
    abort = new AbortController();
    let alarm = setTimeout(() => abort.abort(), SILENCE_MS);
    try {
      const headers = lastEventId ? { "last-event-id": lastEventId } : {};
      const answer = await send(path, { headers, signal: abort.signal });
      if (answer.status === 401 || answer.status === 403) throw new ApiError("", answer.status, "");
      if (!answer.ok) return;
      wait = FIRST_WAIT_MS;
      handlers.onOpen();
      const feed = parser((message) => {
        lastEventId = message.id ?? lastEventId;
        handlers.onMessage(message);
      });
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        clearTimeout(alarm);
        alarm = setTimeout(() => abort.abort(), SILENCE_MS);
        feed(part.value);
      }
    } finally {
      clearTimeout(alarm);
    }
  }

  async function run() {
    while (!stopped) {
      try {
        await once();
      } catch (error) {
        if (error.status === 401 || error.status === 403) {
          if (!stopped) handlers.onRefused(error);
          return;
        }
      }
      if (stopped) return;
      const pause = wait * (0.75 + Math.random() / 2);
      handlers.onWait(pause / 1000);
      await new Promise((resolve) => {
        wake = resolve;
        setTimeout(resolve, pause);
      });
      wait = Math.min(LONGEST_WAIT_MS, wait * 2);
    }
  }

  run();
  return {
    stop() {
      stopped = true;
      abort.abort();
      wake();
    },
    hurry: () => wake(),
  };
}
