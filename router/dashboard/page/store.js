// What the page knows of the yard: read from the server, kept fresh by its events. Draws nothing.

import { get, now } from "./api.js";
import { follow } from "./stream.js";
import { pollTraffic } from "./traffic.js";

const POLL_MS = 5000; // leases and queues change without events
const SETTLE_MS = 120; // one reading for a burst of events
const MAX_FEED = 200;
const AWAY = ["absent", "cold"];
const ACTIVE = ["fetching", "waiting_space", "loading", "warming", "draining", "unloading"];

export class Store {
  constructor(onChange, onRefused) {
    this.onChange = onChange;
    this.onRefused = onRefused;
    this.devices = [];
    this.slots = [];
    this.feed = []; // newest first
    this.connection = { live: false, retryAt: null };
    this.since = new Map(); // slot → {state, at}: when it came into the state it is in
    this.rates = new Map(); // slot → bytes/s of its download
    this.wasLive = false;
  }

  /** Read everything once, then follow. Rejects with the ApiError of a server that lets nobody in. */
  async start() {
    await this.refresh();
    // Starting from 0 brings the events that the server remembers, so that the feed has a past.
    const from = new URLSearchParams(this.devices.map((device) => [device.host_id, "0"])).toString();
    this.stream = follow("/admin/events", from, {
      onOpen: () => this.opened(),
      onMessage: (message) => this.apply(JSON.parse(message.data)),
      onWait: (seconds) => this.waiting(seconds),
      onRefused: this.onRefused,
    });
    this.poll = setInterval(() => this.tick(), POLL_MS);
    this.onVisible = () => document.hidden || this.tick();
    document.addEventListener("visibilitychange", this.onVisible);
  }

  stop() {
    this.stream?.stop();
    clearInterval(this.poll);
    clearTimeout(this.settling);
    document.removeEventListener("visibilitychange", this.onVisible);
  }

  /** The rows of the page: one a model, its slots on all devices together, and the one that says most of it. */
  models() {
    const byId = new Map();
    for (const slot of this.slots) byId.set(slot.id, [...(byId.get(slot.id) ?? []), slot]);
    return [...byId.entries()].map(([id, slots]) => ({ id, slots, slot: telling(slots) }));
  }

  /** A device by the name that people know; where two hosts have devices of one name, by the host's. */
  deviceName(hostId) {
    const device = this.devices.find((each) => each.host_id === hostId)?.device;
    const isAlone = this.devices.filter((each) => each.device === device).length === 1;
    return device && isAlone ? device : hostId;
  }

  slot(modelId, hostId) {
    return this.slots.find((slot) => slot.id === modelId && (!hostId || slot.host_id === hostId));
  }

  secondsInState(slot) {
    const entry = this.since.get(keyOf(slot.id, slot.host_id));
    return entry?.state === slot.state ? Math.max(0, now() - entry.at) : 0;
  }

  isActive() {
    return this.slots.some((slot) => ACTIVE.includes(slot.state) || slot.retry_at);
  }

  async tick() {
    if (document.hidden || !this.connection.live) return;
    await Promise.all([this.refresh(), pollTraffic()]).catch(() => {}); // the stream notices a server that is gone
    this.onChange();
  }

  async refresh() {
    const [memory, slots] = await Promise.all([get("/admin/memory"), get("/admin/models")]);
    this.devices = memory.devices;
    this.slots = slots.data;
    for (const slot of this.slots) {
      const key = keyOf(slot.id, slot.host_id);
      if (this.since.get(key)?.state !== slot.state) this.since.set(key, { state: slot.state, at: now() });
    }
    this.onChange();
  }

  opened() {
    this.connection = { live: true, retryAt: null };
    if (this.wasLive) this.note({ kind: "note", words: "feed.back", time_s: now() });
    this.wasLive = true;
    this.onChange();
    this.tick();
  }

  waiting(seconds) {
    if (this.connection.live) this.note({ kind: "note", words: "feed.lost", time_s: now() });
    this.connection = { live: false, retryAt: now() + seconds };
    this.onChange();
  }

  apply(event) {
    const key = keyOf(event.model_id, event.host_id);
    const slot = this.slot(event.model_id, event.host_id);
    if (event.kind === "progress") this.applyProgress(key, slot, event); // nothing else has changed
    else {
      this.applyStep(key, slot, event);
      this.settle();
    }
    this.onChange();
  }

  applyProgress(key, slot, event) {
    const before = this.rates.get(key);
    const seconds = before ? event.time_s - before.at : 0;
    if (!before || seconds >= 0.5) {
      const rate = before ? Math.max(0, event.done_bytes - before.done) / seconds : 0;
      this.rates.set(key, { at: event.time_s, done: event.done_bytes, rate });
    }
    if (!slot) return;
    slot.fetched_bytes = event.done_bytes;
    slot.fetch_total_bytes = event.total_bytes;
  }

  applyStep(key, slot, event) {
    this.since.set(key, { state: event.target, at: event.time_s });
    if (event.target === "fetching") this.rates.delete(key);
    const used = slot?.last_used_at;
    const idle = used && used <= event.time_s ? event.time_s - used : null;
    this.note({ ...event, weight_bytes: slot?.weight_bytes || slot?.need_bytes || 0, idle_s: idle });
    if (slot) slot.state = event.target;
  }

  note(entry) {
    this.feed.unshift(entry);
    this.feed.length = Math.min(this.feed.length, MAX_FEED);
  }

  settle() {
    clearTimeout(this.settling);
    this.settling = setTimeout(() => this.refresh().catch(() => {}), SETTLE_MS);
  }
}

/** The server lists the slot nearest to serving first; but a failure must not hide behind a device that never tried. */
function telling(slots) {
  return AWAY.includes(slots[0].state) ? slots.find((slot) => slot.state === "failed") ?? slots[0] : slots[0];
}

export function keyOf(modelId, hostId) {
  return `${modelId}\n${hostId}`;
}
