// verify.js: do the two ends of a connection talk to each other, or to someone
// in between? The server passes the fingerprints of the DTLS certificates on,
// and could put in its own. So both sides compare what they see of them: by a
// key that came with the link, or by five emoji that people look at.
//
// All messages are JSON texts on one data channel:
//
//   both        { t: "hello", role, hasKey }
//   with a key  { t: "mac", mac }           from both
//   without     { t: "commit", commit }     from A: SHA-256(nA)
//               { t: "nonce", nonce }       from B: nB
//               { t: "nonce", nonce }       from A: nA
//
// A commits itself before it sees nB, and B answers before it sees nA: nobody
// in between can try nonces until the emoji agree; it has one guess in 2^30.

import { sha256 } from "./vendor/noble-hashes/sha2.js";
import { hmac } from "./vendor/noble-hashes/hmac.js";

const PATIENCE = 30_000; // ms, for the next message
const LABEL = new TextEncoder().encode("parley-verify-v1");

/** Sixty-four things that are told apart at a glance: six bits each. */
export const EMOJI = `
🐶 dog, 🐱 cat, 🦁 lion, 🐴 horse, 🐮 cow, 🐷 pig, 🐘 elephant, 🐰 rabbit,
🐼 panda, 🦊 fox, 🐧 penguin, 🐢 turtle, 🐟 fish, 🐙 octopus, 🦋 butterfly, 🐝 bee,
🐌 snail, 🦉 owl, 🌵 cactus, 🌲 tree, 🍄 mushroom, 🌻 sunflower, 🌞 sun, 🌙 moon,
🌈 rainbow, 🔥 fire, ⛄ snowman, 🍎 apple, 🍌 banana, 🍓 strawberry, 🍋 lemon, 🍇 grapes,
🌽 corn, 🥕 carrot, 🍕 pizza, 🎂 cake, ⚽ football, 🎸 guitar, 🎺 trumpet, 🔔 bell,
🔑 key, 🔒 lock, 🔨 hammer, 🎈 balloon, 🎁 gift, 👓 glasses, 🎩 hat, 📖 book,
📎 paperclip, ⏰ clock, 💡 lamp, 🚗 car, 🚲 bicycle, 🚂 train, 🚀 rocket, ⛵ sailboat,
⚓ anchor, 🏠 house, ⛺ tent, 🏰 castle, 🤖 robot, 👻 ghost, 👑 crown, 🏆 trophy`
  .split(",")
  .map((entry) => {
    const [symbol, name] = entry.trim().split(" ");
    return Object.freeze({ symbol, name });
  });

/**
 * Verifies the connection `pc` over `channel`, which is open. `role` is "A" or
 * "B", `key` the bytes of the shared key, where this side has it. Resolves with
 * `{ mode: "key" }` when the key has proved it, or with
 * `{ mode: "compare", emoji: [{ symbol, name }, …] }` for people to compare.
 * Rejects with an Error named PeerNotAuthentic when something does not match,
 * and with one named VerifyFailed when it came to no end.
 */
export async function verify({ pc, channel, role, key = null, patience = PATIENCE }) {
  const inbox = new Inbox(channel, patience);
  try {
    const other = role === "A" ? "B" : "A";
    const { fpA, fpB } = fingerprints(pc, role);
    const send = (message) => channel.send(JSON.stringify(message));

    send({ t: "hello", role, hasKey: Boolean(key) });
    const hello = await inbox.next("hello");
    if (typeof hello.hasKey !== "boolean") throw failed("The other device sent something that makes no sense.");
    if (hello.role !== other) throw failed("Both devices say that they are the same side.");

    let result;
    if (key && hello.hasKey) result = await byKey();
    // B has its key from A's own link. An A without one is not the one that made it.
    else if (role === "B" ? key : hello.hasKey) throw notAuthentic("The other device does not know the key of the link.");
    else result = { mode: "compare", emoji: emojiOf(sha256(concat(fpA, fpB, ...(await nonces())))) };

    // What was shown to be right must be what the connection still uses.
    const now = fingerprints(pc, role);
    if (!equal(now.fpA, fpA) || !equal(now.fpB, fpB)) throw notAuthentic("The certificates changed.");
    return result;

    async function byKey() {
      send({ t: "mac", mac: toHex(macOf(key, role, fpA, fpB)) });
      const { mac } = await inbox.next("mac");
      if (!equal(fromHex(mac), macOf(key, other, fpA, fpB))) throw notAuthentic("The proof of the key is wrong.");
      return { mode: "key" };
    }

    // nonces returns [nA, nB].
    async function nonces() {
      const own = crypto.getRandomValues(new Uint8Array(32));
      if (role === "A") {
        send({ t: "commit", commit: toHex(sha256(own)) });
        const theirs = fromHex((await inbox.next("nonce")).nonce);
        send({ t: "nonce", nonce: toHex(own) });
        return [own, theirs];
      }
      const commit = fromHex((await inbox.next("commit")).commit);
      send({ t: "nonce", nonce: toHex(own) });
      const theirs = fromHex((await inbox.next("nonce")).nonce);
      if (!equal(sha256(theirs), commit)) throw notAuthentic("The other device broke its commitment.");
      return [theirs, own];
    }
  } finally {
    inbox.close();
  }
}

/** The fingerprints of both sides' certificates, as the descriptions of `pc` have them. */
export function fingerprints(pc, role) {
  const local = fingerprintOf(pc.localDescription?.sdp);
  const remote = fingerprintOf(pc.remoteDescription?.sdp);
  // Where a browser says which certificate is in use, that is what counts.
  const [used] = pc.sctp?.transport?.getRemoteCertificates?.() ?? [];
  if (used && !equal(sha256(new Uint8Array(used)), remote)) throw notAuthentic("The certificate in use is another one.");
  if (equal(local, remote)) throw notAuthentic("Both devices have the same certificate.");
  return role === "A" ? { fpA: local, fpB: remote } : { fpA: remote, fpB: local };
}

// A browser takes a certificate that matches one of several lines; so there
// must not be several, nor one of another hash.
function fingerprintOf(sdp = "") {
  const found = new Set();
  for (const line of sdp.split(/\r\n|\r|\n/)) {
    if (!/^a=fingerprint:/i.test(line)) continue;
    const match = /^a=fingerprint:\s*sha-256\s+((?:[0-9a-f]{2}:){31}[0-9a-f]{2})\s*$/i.exec(line);
    if (!match) throw notAuthentic("A fingerprint is not of SHA-256.");
    found.add(match[1].replaceAll(":", "").toLowerCase());
  }
  if (found.size !== 1) throw notAuthentic(found.size ? "The fingerprints do not agree." : "There is no fingerprint.");
  return fromHex(...found);
}

// The role in it keeps anyone from sending a MAC back to who made it.
function macOf(key, role, fpA, fpB) {
  return hmac(sha256, key, concat(LABEL, Uint8Array.of(role.charCodeAt(0)), fpA, fpB));
}

// emojiOf takes the first 30 bits, six for each.
function emojiOf(hash) {
  const bits = ((hash[0] << 24) | (hash[1] << 16) | (hash[2] << 8) | hash[3]) >>> 0;
  return [26, 20, 14, 8, 2].map((shift) => EMOJI[(bits >>> shift) & 63]);
}

// An Inbox hands out messages one by one, each only as the type that is due.
class Inbox {
  #messages = [];
  #waiting = null;
  #error = null;
  #stop = new AbortController();
  #patience;

  constructor(channel, patience) {
    this.#patience = patience;
    const options = { signal: this.#stop.signal };
    channel.addEventListener("message", ({ data }) => this.#received(data), options);
    channel.addEventListener("close", () => this.#fail(failed("The connection was closed.")), options);
  }

  async next(type) {
    const message = this.#messages.shift() ?? (await this.#arrival());
    if (message.t !== type) throw failed("The other device sent something out of order.");
    return message;
  }

  close() {
    this.#stop.abort();
  }

  #arrival() {
    if (this.#error) throw this.#error;
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => this.#fail(failed("The other device did not answer.")), this.#patience);
      const settle = (how) => (value) => {
        clearTimeout(timer);
        this.#waiting = null;
        how(value);
      };
      this.#waiting = { resolve: settle(resolve), reject: settle(reject) };
    });
  }

  #received(data) {
    let message = null;
    try {
      if (typeof data === "string" && data.length < 1024) message = JSON.parse(data);
    } catch {
      // told below
    }
    if (typeof message?.t !== "string" || this.#messages.length > 3) {
      this.#fail(failed("The other device sent something that makes no sense."));
    } else if (this.#waiting) {
      this.#waiting.resolve(message);
    } else {
      this.#messages.push(message);
    }
  }

  #fail(error) {
    this.#error ??= error;
    this.#waiting?.reject(this.#error);
  }
}

function notAuthentic(message) {
  return Object.assign(new Error(message), { name: "PeerNotAuthentic" });
}

function failed(message) {
  return Object.assign(new Error(message), { name: "VerifyFailed" });
}

function toHex(bytes) {
  return Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
}

function fromHex(text) {
  if (typeof text !== "string" || !/^[0-9a-f]{64}$/.test(text)) throw failed("The other device sent something that makes no sense.");
  return Uint8Array.from(text.match(/../g), (pair) => parseInt(pair, 16));
}

function concat(...parts) {
  const all = new Uint8Array(parts.reduce((n, part) => n + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

// equal takes the same time wherever the difference is.
function equal(a, b) {
  let difference = a.length ^ b.length;
  for (let i = 0; i < a.length; i++) difference |= a[i] ^ b[i];
  return difference === 0;
}
