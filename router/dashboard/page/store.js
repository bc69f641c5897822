// The page's state: read from the server, and updated by its events. Independent of drawing.

import { get, now } from "./api.js";
import { follow } from "./stream.js";
import { pollTraffic } from "./traffic.js";

const POLL_MS = 5000; // leases and queues change without events
const SETTLE_MS = 120; // one refresh per burst of events
const MAX_FEED = 200;
const NOT_LOADED = ["absent", "cold"];
const ACTIVE = ["fetching", "waiting_space", "loading", "warming", "draining", "parking", "waking", "unloading"];

export class Store {
  constructor(onChange, onRefused) {
    this.onChange = onChange;
    this.onRefused = onRefused;
    this.devices = [];
    this.slots = [];
    this.feed = []; // newest first
    this.connection = { live: false, retryAt: null };
    this.since = new Map(); // slot → {state, at}: its state, and when it entered it
    this.rates = new Map(); // slot → bytes/s of its download
    this.wasLive = false;
  }

  /** Reads everything once, then follows the events. Rejects with an ApiError when the server refuses. */
  async start() {
    await this.refresh();
    // Starting from 0 returns the server's buffered events, so that the list has a history.
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

  /** Returns one row per model: its slots on all devices, and the most informative one. */
  models() {
    const byId = new Map();
    for (const slot of this.slots) byId.set(slot.id, [...(byId.get(slot.id) ?? []), slot]);
    return [...byId.entries()].map(([id, slots]) => ({ id, slots, slot: mostInformative(slots) }));
  }

  /** Returns a device's name; the host id when two hosts have devices of the same name. */
  deviceName(hostId) {
    const device = this.devices.find((each) => each.host_id === hostId)?.device;
    const isAlone = this.devices.filter((each) => each.device === device).length === 1;
    return device && isAlone ? device : hostId;
  }

  /** Returns the slot of a model that is split, if this host has a share of it. */
  splitSlot(modelId, hostId) {
    return this.slots.find((slot) => slot.id === modelId && slot.shares?.some((share) => share.host_id === hostId));
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
    await Promise.all([this.refresh(), pollTraffic()]).catch(() => {}); // the stream detects an unreachable server
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

/** The server lists the slot nearest to ready first; a failed slot takes precedence over unloaded ones. */
function mostInformative(slots) {
  return NOT_LOADED.includes(slots[0].state) ? slots.find((slot) => slot.state === "failed") ?? slots[0] : slots[0];
}

export function keyOf(modelId, hostId) {
  return `${modelId}\n${hostId}`;
}
