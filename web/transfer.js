// transfer.js: files over one ordered, reliable data channel, both ways at once.
//
// Who sends a file offers it, and sends it once it was accepted; accepted files
// go one at a time, in the order of their accepts. So chunks need no header:
// they belong to the file that was accepted first and is not at its end yet.
//
//   sender    { t: "offer", id, name, size, type }  …  chunks  { t: "done", id, sha256 }
//   receiver  { t: "accept", id }   { t: "got", id, bytes }    { t: "ok", id } or { t: "bad", id }
//   either    { t: "cancel", id }
//
// After a cancel of the receiver's, chunks that were on their way still come,
// until the sender's own cancel or done for the same file.

import { sha256 } from "./vendor/noble-hashes/sha2.js";

const CHUNK = 256 * 1024; //     what browsers take as one message, or less
const SLICE = 4 * 1024 * 1024; //   read at once, one ahead
const HIGH = 4 * 1024 * 1024; //    bufferedAmount at which sending pauses
const LOW = 1024 * 1024; //         and at which it goes on
const WINDOW = 64 * 1024 * 1024; // sent, but not yet stored over there: bounds the memory of a slow receiver
const ACK_EVERY = 2 * 1024 * 1024;
const WRITE = 1024 * 1024; //       to disk at once
const PART = 16 * 1024 * 1024; //   of a Blob; browsers keep large ones on disk
const MAX_OFFERS = 100; //          that wait, in one direction
const MAX_ITEMS = 5_000; //         taken from the other device, over all
const TICK = 100; //                ms between two updates
const SMOOTH = 3_000; //            ms over which speed is averaged
const LOST = "The connection to the other device was lost.";

/**
 * The files between two devices. Events: `add` and `update`, both with an item
 * as detail: { id, direction: "in" | "out", name, size, type, bytes, speed,
 * remaining, state: "offered" | "active" | "done" | "failed" | "cancelled",
 * note, waiting, disk, url, sha256 }. `waiting` says that an offer waits for
 * this side's answer, `disk` that the file goes to disk; others get a `url` in
 * the end, which is the page's to revoke.
 */
export class Transfer extends EventTarget {
  #channel;
  #chunk;
  #out = new Map();
  #in = new Map();
  #queue = []; //    of ours: not yet offered
  #accepted = []; // of ours: to be sent
  #arriving = []; // of theirs: accepted, in the order in which they come
  #sending = false;
  #wake = () => {};
  #held; //          messages, until release()
  #askFirst;
  #timer = 0;
  #closed = false;
  #stop = new AbortController();

  /**
   * `channel` is open. `held` transfers nothing before release(). `askFirst(item)`
   * says whether an offer waits for accept(); others are accepted at once.
   */
  constructor({ channel, pc, held = false, askFirst = () => false }) {
    super();
    this.#channel = channel;
    this.#chunk = Math.min(CHUNK, pc?.sctp?.maxMessageSize || CHUNK);
    this.#held = held ? [] : null;
    this.#askFirst = askFirst;
    channel.binaryType = "arraybuffer";
    channel.bufferedAmountLowThreshold = LOW;
    const options = { signal: this.#stop.signal };
    channel.addEventListener("message", ({ data }) => this.#received(data), options);
    channel.addEventListener("bufferedamountlow", () => this.#wake(), options);
    channel.addEventListener("close", () => this.close(LOST), options);
  }

  get items() {
    return [...this.#out.values(), ...this.#in.values()];
  }
  get active() {
    return this.items.some((item) => item.state === "active");
  }

  /** Lets go what was held. */
  release() {
    const messages = this.#held;
    this.#held = null;
    for (const data of messages ?? []) this.#received(data);
    this.#offer();
  }

  /** Sends files, one after the other. */
  send(files) {
    for (const file of files) {
      const item = newItem("out", randomID(), file.name || "file", file.size, file.type);
      Object.assign(item, { file, sent: 0, got: 0 });
      this.#out.set(item.id, item);
      emit(this, "add", item);
      if (this.#closed) this.#end(item, "failed", "There is no connection to the other device.");
      else this.#queue.push(item);
    }
    this.#offer();
  }

  /** Accepts an offer; with a FileSystemWritableFileStream the file goes to disk. */
  accept(item, writable = null) {
    if (item.direction !== "in" || item.state !== "offered" || this.#closed) {
      writable?.abort().catch(() => {});
      return;
    }
    const stored = () => this.#stored(item);
    item.sink = writable ? new DiskSink(writable, stored, (error) => this.#sinkFailed(item, error)) : new BlobSink(stored);
    item.disk = Boolean(writable);
    item.hash = sha256.create();
    item.waiting = false;
    this.#arriving.push(item);
    this.#start(item);
    this.#tell({ t: "accept", id: item.id });
  }

  /** Ends a transfer, of either direction, at any time. */
  cancel(item, state = "cancelled", note = item.direction === "in" && item.state === "offered" ? "Declined" : "Cancelled") {
    if (isOver(item) || item.finishing) return;
    const known = item.direction === "in" || !this.#queue.includes(item);
    this.#end(item, state, note);
    if (known) this.#tell({ t: "cancel", id: item.id });
  }

  /** Fails everything that is under way, and takes nothing any more. */
  close(reason) {
    if (this.#closed) return;
    this.#closed = true;
    this.#stop.abort();
    for (const item of this.items) this.#end(item, "failed", reason);
  }

  // --- Sending.

  #offer() {
    if (this.#held || this.#closed) return;
    let waiting = [...this.#out.values()].filter((item) => item.offered && item.state === "offered").length;
    while (this.#queue.length > 0 && waiting < MAX_OFFERS) {
      const item = this.#queue.shift();
      item.offered = true;
      waiting++;
      this.#tell({ t: "offer", id: item.id, name: item.name, size: item.size, type: item.type });
    }
  }

  async #pump() {
    if (this.#sending) return;
    this.#sending = true;
    while (this.#accepted.length > 0) {
      const item = this.#accepted.shift();
      if (item.state !== "offered") continue;
      this.#start(item);
      try {
        await this.#stream(item);
      } catch (error) {
        if (this.#channel.readyState !== "open") return this.close(LOST);
        this.cancel(item, "failed", error.name === "NotReadableError" || error.name === "NotFoundError"
          ? "The file could not be read. Was it changed, or is it a folder?"
          : "The file could not be sent.");
      }
    }
    this.#sending = false;
  }

  async #stream(item) {
    const { file, size } = item;
    const hash = sha256.create();
    const read = (at) => {
      const slice = file.slice(at, at + SLICE).arrayBuffer();
      slice.catch(() => {}); // whoever awaits it is told
      return slice;
    };
    for (let at = 0, next = read(0); at < size; ) {
      const bytes = new Uint8Array(await next);
      if (bytes.length === 0) throw new DOMException("The file became shorter.", "NotReadableError");
      at += bytes.length;
      if (at < size) next = read(at);
      // Hashing comes when the buffer is full: the network has work meanwhile.
      let hashed = 0;
      for (let i = 0; i < bytes.length; i += this.#chunk) {
        if (this.#channel.bufferedAmount > HIGH || item.sent - item.got > WINDOW) {
          hash.update(bytes.subarray(hashed, i));
          hashed = i;
          await this.#room(item);
        }
        if (item.state !== "active") return;
        const chunk = bytes.subarray(i, i + this.#chunk);
        this.#channel.send(chunk);
        item.sent += chunk.length;
      }
      hash.update(bytes.subarray(hashed));
    }
    if (item.state !== "active") return;
    item.sha256 = toHex(hash.digest());
    this.#tell({ t: "done", id: item.id, sha256: item.sha256 });
  }

  // room waits until there is room to go on, or no reason to.
  async #room(item) {
    while (item.state === "active" && (this.#channel.bufferedAmount > LOW || item.sent - item.got > WINDOW)) {
      await new Promise((resolve) => (this.#wake = resolve));
    }
  }

  // --- Receiving.

  #received(data) {
    if (this.#closed) return;
    if (this.#held) {
      // Who holds sends nothing but offers, and not more than may wait.
      if (this.#held.push(data) > 2 * MAX_OFFERS) this.close("The other device sent too much.");
      return;
    }
    if (typeof data !== "string") return this.#chunkCame(new Uint8Array(data));
    let message;
    try {
      message = JSON.parse(data);
    } catch {
      return this.close("The other device sent something that makes no sense.");
    }
    const out = this.#out.get(message?.id);
    const item = this.#in.get(message?.id);
    switch (message?.t) {
      case "offer":
        return this.#offered(message);
      case "accept":
        if (out?.state !== "offered" || !out.offered || this.#accepted.includes(out)) return;
        this.#accepted.push(out);
        this.#pump();
        return this.#offer();
      case "got":
        if (out && Number.isSafeInteger(message.bytes) && message.bytes <= out.sent) out.got = Math.max(out.got, message.bytes);
        return this.#wake();
      case "ok":
        if (out?.state === "active" && out.sha256) this.#end(out, "done", "Sent, and checked by the other device");
        return;
      case "bad":
        if (!out || isOver(out)) return;
        this.#end(out, "failed", "It arrived damaged. Send it again.");
        return this.#tell({ t: "cancel", id: out.id });
      case "done":
        return item && this.#complete(item, message.sha256);
      case "cancel":
        if (out) return this.#cancelledBy(out);
        if (item) {
          this.#arriving = this.#arriving.filter((one) => one !== item);
          this.#end(item, "cancelled", "Cancelled by the other device");
        }
    }
  }

  #cancelledBy(item) {
    const streaming = item.state === "active";
    const mine = isOver(item);
    this.#end(item, "cancelled", streaming ? "Cancelled by the other device" : "Declined by the other device");
    if (!mine) this.#tell({ t: "cancel", id: item.id }); // what comes after this is of the next file
    this.#offer();
  }

  #offered({ id, name, size, type }) {
    if (typeof id !== "string" || !/^[\w-]{1,32}$/.test(id) || this.#in.has(id) || this.#out.has(id)) return;
    // The sender counts those that wait; here those under way count as well.
    if (this.#in.size >= MAX_ITEMS) return this.#tell({ t: "cancel", id });
    const open = [...this.#in.values()].filter((item) => !isOver(item)).length;
    if (open >= 2 * MAX_OFFERS || !Number.isSafeInteger(size) || size < 0 || typeof name !== "string") {
      return this.#tell({ t: "cancel", id });
    }
    const item = newItem("in", id, cleanName(name), size, typeof type === "string" ? type.slice(0, 100) : "");
    this.#in.set(id, item);
    item.waiting = this.#askFirst(item);
    emit(this, "add", item);
    if (!item.waiting) this.accept(item);
  }

  #chunkCame(chunk) {
    const item = this.#arriving[0];
    if (!item) return this.close("The other device sent something that makes no sense.");
    if (item.state !== "active") return; // cancelled, and the other does not know yet
    if (item.bytes + chunk.length > item.size || chunk.length > WRITE) return this.#spoilt(item, "The other device sent something else than it had offered.");
    item.bytes += chunk.length;
    item.hash.update(chunk);
    item.sink.write(chunk);
  }

  #stored(item) {
    const bytes = item.sink.stored;
    if (bytes - (item.acked ?? 0) < ACK_EVERY || item.state !== "active") return;
    item.acked = bytes;
    this.#tell({ t: "got", id: item.id, bytes });
  }

  async #complete(item, sum) {
    if (this.#arriving[0] !== item) return;
    this.#arriving.shift();
    if (item.state !== "active") return;
    item.sha256 = toHex(item.hash.digest());
    if (item.bytes !== item.size) return this.#spoilt(item, "It is not complete. Ask for it again.");
    if (item.sha256 !== sum) return this.#spoilt(item, "It arrived damaged: the checksum is wrong. Ask for it again.");
    item.finishing = true;
    try {
      const blob = await item.sink.finish();
      if (isOver(item)) return;
      if (blob) item.url = URL.createObjectURL(blob);
      this.#end(item, "done", blob ? "Received, checked" : "Saved, checked");
      this.#tell({ t: "ok", id: item.id });
    } catch (error) {
      item.finishing = false;
      this.#sinkFailed(item, error);
    }
  }

  #spoilt(item, note) {
    this.#end(item, "failed", note);
    this.#tell({ t: "bad", id: item.id });
  }

  #sinkFailed(item, error) {
    this.cancel(item, "failed", error?.name === "QuotaExceededError" ? "There is no room for it on this device." : "It could not be stored on this device.");
  }

  // --- Both.

  #tell(message) {
    if (this.#channel.readyState === "open") this.#channel.send(JSON.stringify(message));
  }

  #start(item) {
    item.state = "active";
    item.samples = [[performance.now(), 0]];
    emit(this, "update", item);
    this.#timer ||= setInterval(() => this.#tick(), TICK);
  }

  #end(item, state, note) {
    if (isOver(item)) return;
    if (state === "done") item.bytes = item.size;
    Object.assign(item, { state, note, waiting: false, speed: 0, remaining: null });
    if (state !== "done") item.sink?.abort();
    item.sink = item.hash = item.samples = null;
    if (state === "done") item.file = null; // what failed can be sent again
    if (item.direction === "out") this.#queue = this.#queue.filter((one) => one !== item);
    emit(this, "update", item);
    this.#wake();
  }

  #tick() {
    const now = performance.now();
    let busy = false;
    for (const item of this.items) {
      if (item.state !== "active") continue;
      busy = true;
      if (item.direction === "out") item.bytes = Math.max(item.bytes, item.sent - this.#channel.bufferedAmount);
      item.samples.push([now, item.bytes]);
      while (item.samples.length > 2 && now - item.samples[1][0] >= SMOOTH) item.samples.shift();
      const [then, before] = item.samples[0];
      item.speed = now - then > 300 ? ((item.bytes - before) / (now - then)) * 1000 : 0;
      item.remaining = item.speed > 0 ? (item.size - item.bytes) / item.speed : null;
      emit(this, "update", item);
    }
    if (busy) return;
    clearInterval(this.#timer);
    this.#timer = 0;
  }
}

// A BlobSink keeps a file in memory, or where the browser keeps its Blobs.
class BlobSink {
  stored = 0;
  #parts = [];
  #chunks = [];
  #size = 0;
  #onstored;

  constructor(onstored) {
    this.#onstored = onstored;
  }

  write(chunk) {
    this.#chunks.push(chunk);
    this.#size += chunk.length;
    if (this.#size >= PART) this.#flush();
    this.stored += chunk.length;
    this.#onstored();
  }

  // Whatever the sender calls it, it is nothing that a page of ours shows.
  async finish() {
    this.#flush();
    return new Blob(this.#parts, { type: "application/octet-stream" });
  }

  abort() {
    this.#parts = this.#chunks = [];
  }

  #flush() {
    this.#parts.push(new Blob(this.#chunks));
    this.#chunks = [];
    this.#size = 0;
  }
}

// A DiskSink writes to a file that the user has picked.
class DiskSink {
  stored = 0;
  #writable;
  #onstored;
  #onerror;
  #buffer = new Uint8Array(WRITE);
  #used = 0;
  #tail = Promise.resolve();
  #over = false;

  constructor(writable, onstored, onerror) {
    this.#writable = writable;
    this.#onstored = onstored;
    this.#onerror = onerror;
  }

  write(chunk) {
    if (this.#used + chunk.length > WRITE) this.#flush();
    this.#buffer.set(chunk, this.#used);
    this.#used += chunk.length;
  }

  async finish() {
    this.#flush();
    await this.#tail;
    await this.#writable.close();
    return null;
  }

  abort() {
    this.#over = true;
    this.#writable.abort().catch(() => {});
  }

  #flush() {
    const bytes = this.#buffer.subarray(0, this.#used);
    this.#buffer = new Uint8Array(WRITE);
    this.#used = 0;
    this.#tail = this.#tail.then(async () => {
      if (this.#over) return;
      await this.#writable.write(bytes);
      if (this.#over) return;
      this.stored += bytes.length;
      this.#onstored();
    });
    this.#tail.catch(this.#onerror);
  }
}

function newItem(direction, id, name, size, type) {
  return { id, direction, name, size, type, bytes: 0, speed: 0, remaining: null, state: "offered", note: "", waiting: false, disk: false, url: null, sha256: null };
}

function isOver({ state }) {
  return state === "done" || state === "failed" || state === "cancelled";
}

// cleanName takes out what could make a name look like another: control
// characters, those that turn the direction of writing, and folders.
function cleanName(name) {
  const clean = name.replace(/[\p{Cc}\u200e\u200f\u202a-\u202e\u2066-\u2069]/gu, "").replace(/[/\\]/g, "_").trim();
  return clean.slice(-200) || "file";
}

function randomID() {
  return toHex(crypto.getRandomValues(new Uint8Array(8)));
}

function toHex(bytes) {
  return Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
}

function emit(target, type, detail) {
  target.dispatchEvent(new CustomEvent(type, { detail }));
}
