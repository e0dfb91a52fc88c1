// Two apps talk through a running parley, whose base URL is PARLEY_URL, while
// each of them is killed and started again. What counts is what the apps
// themselves sent and heard.

import assert from "node:assert/strict";
import { randomInt, randomUUID } from "node:crypto";
import { once } from "node:events";
import { test } from "node:test";
import { setImmediate as nextTurn, setTimeout as sleep } from "node:timers/promises";

import { mailboxTransport } from "@noisytransfer/transport";
import WebSocket from "ws";

const server = process.env.PARLEY_URL;
assert.ok(server, "PARLEY_URL must name a running parley, such as http://127.0.0.1:1234");
const wsBase = server.replace(/^http/, "ws") + "/ws";

const NOTES = 1000; // each app sends this many
const WINDOW = 32; // and at most this many ahead of what the other has acknowledged, as the server knows it
const CONFIRM = 8; // notes, after which an app makes sure of that

// meet lets two apps find each other as people do, by a code, and returns what
// they then share.
async function meet() {
  const post = async (path, body) => {
    const answer = await fetch(server + path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
    });
    assert.equal(answer.status, 200, `POST ${path}: ${answer.status}`);
    return answer.json();
  };
  const minted = await post("/rendezvous/code", {});
  const redeemed = await post("/rendezvous/redeem", { code: minted.code });
  assert.equal(redeemed.appID, minted.appID);
  return redeemed.appID;
}

// A Watch is how a test waits, and how it ends early: what is thrown in a
// callback of the published client is swallowed there.
class Watch {
  #error;

  constructor(t) {
    t.after(() => this.fail("the test is over"));
  }

  fail(message) {
    this.#error ??= new Error(message);
  }

  check() {
    if (this.#error) throw this.#error;
  }

  async until(condition, what, ms = 30_000) {
    const deadline = Date.now() + ms;
    for (;;) {
      this.check();
      if (condition()) return;
      assert.ok(Date.now() < deadline, `still waiting for ${what} after ${ms} ms`);
      await sleep(1);
    }
  }
}

// A Life is one run of an app's process, as far as the network can tell: the
// sockets it opens, and a kill that ends them without a word and lets no other
// be opened. (The published client opens new ones for as long as its process
// lives, whatever the close code and even after it stopped listening to them.)
class Life {
  dead = false;
  sockets = [];
  closes = []; // their close codes, in order
  frames = []; // what they received, parsed, in order
  #pings = 0;
  #asked = new Map();

  constructor() {
    const life = this;
    this.WebSocket = function (url, protocols) {
      if (life.dead) return { addEventListener() {}, send() {}, close() {} };
      const socket = new WebSocket(url, protocols);
      socket.on("message", (data) => {
        const frame = JSON.parse(data);
        life.frames.push(frame);
        if (frame.type === "pong") life.#asked.get(frame.t)?.();
      });
      socket.on("close", (code) => life.closes.push(code));
      socket.on("error", () => {});
      life.sockets.push(socket);
      return socket;
    };
  }

  // transport starts the published client in this life.
  transport(options) {
    globalThis.WebSocket = this.WebSocket; // where the client looks for it, once
    return mailboxTransport(wsBase, options);
  }

  get socket() {
    return this.sockets.at(-1);
  }

  // settle waits until the server has taken everything sent so far.
  async settle(watch) {
    if (this.socket.readyState === WebSocket.CONNECTING) await once(this.socket, "open");
    let settled = false;
    this.ask(() => (settled = true));
    await watch.until(() => settled, "a pong");
  }

  // ask calls back once the server has taken everything sent so far, unless the
  // socket dies before.
  ask(callback) {
    const t = ++this.#pings;
    this.#asked.set(t, callback);
    if (!this.dead) this.socket.send(JSON.stringify({ type: "ping", t }));
  }

  kill() {
    this.dead = true;
    for (const socket of this.sockets) socket.terminate();
  }
}

// note is what side says as its nth message: something of everything that the
// client can carry.
function note(side, n) {
  return { n, text: `${side} says "${n}" \u2028 ↯ \\ \u{1F98A}`, ct: Uint8Array.of(n & 255, n >> 8) };
}

// An App sends its notes with the published client and logs what it hears.
class App {
  lives = []; // of each: how many notes had been heard when it began, whether it knew the watermark, the notes it heard
  sent = 0;
  heard = 0; // the highest note logged
  confirmed = 0; // the highest that the server knows to be acknowledged, or is to deliver again
  roomFull = 0;
  #watermark = 0; // seq of the last note logged
  #doom = null; // "before logging" or "after logging": killed at the next note
  #paused = false;

  constructor(appID, side, watch) {
    Object.assign(this, { appID, side, watch, sid: randomUUID() });
  }

  // start begins a new life, one that has kept the watermark or forgot it.
  async start(remembers) {
    this.watch.check();
    const life = (this.life = new Life());
    const entry = { before: this.heard, remembers, notes: [] };
    this.lives.push(entry);
    this.tx = await life.transport({
      room: this.appID,
      side: this.side,
      sessionId: this.sid,
      deliveredUpTo: remembers ? this.#watermark : 0,
    });
    this.tx.onMessage((message) => {
      if (life.dead) return;
      if (message.n === undefined) {
        this.#serverSaid(message);
        return;
      }
      if (this.#doom === "before logging") return life.kill();
      entry.notes.push(message);
      this.heard = Math.max(this.heard, message.n);
      this.#watermark = life.frames.findLast((frame) => frame.type === "deliver").seq;
      if (this.#doom === "after logging") return life.kill(); // and so before acknowledging it
      if (entry.notes.length % CONFIRM === 0) this.#confirm(life).catch(() => {}); // it was killed
    });
    this.#confirm(life).catch(() => {});
    this.tx.onClose(({ code, reason }) => {
      if (!life.dead) this.watch.fail(`the server closed ${this.side} with ${code} ${reason}`);
    });
    this.#paused = false;
  }

  // confirm runs after the client has acknowledged what was heard so far.
  async #confirm(life) {
    const { heard } = this;
    await nextTurn();
    if (life.socket.readyState === WebSocket.CONNECTING) await once(life.socket, "open");
    life.ask(() => (this.confirmed = Math.max(this.confirmed, heard)));
  }

  #serverSaid(message) {
    if (message.type === "room_full") this.roomFull++;
    if (message.type === "error") this.watch.fail(`${this.side} was told ${JSON.stringify(message)}`);
  }

  // talk sends everything this app has to say.
  async talk(peer, upTo = NOTES) {
    while (this.sent < upTo) {
      const mayTalk = () => !this.#paused && this.sent - peer.confirmed < WINDOW;
      await this.watch.until(mayTalk, `${peer.side} to acknowledge ${this.side}`);
      this.tx.send(note(this.side, ++this.sent));
      if (this.sent % 8 === 0) await nextTurn();
    }
  }

  // settle falls silent and waits until the server has taken all that was sent.
  // The published client does not number its mail, so what it wrote to a socket
  // that died unnoticed is gone; here the server is tested, not that.
  async settle() {
    this.#paused = true;
    await this.life.settle(this.watch);
  }

  // die is killed at a random moment, and often amid what is delivered to it.
  async die() {
    await this.settle();
    this.#doom = [null, "before logging", "after logging"][randomInt(3)];
    const deadline = Date.now() + randomInt(30);
    while (!this.life.dead && Date.now() < deadline) await nextTurn();
    this.life.kill();
    this.#doom = null;
  }

  // check reads the log: every life goes on where the one before it stopped, or
  // somewhat earlier if it forgot the watermark, and misses nothing from there.
  check(peer, total) {
    assert.equal(this.heard, total, `${this.side} heard ${this.heard} of ${total} notes`);
    this.lives.forEach(({ before, remembers, notes }, i) => {
      const where = `life ${i + 1} of ${this.side}, which began after note ${before}`;
      notes.forEach((got, j) => {
        assert.deepEqual(got, note(peer.side, got.n), where);
        if (j > 0) assert.equal(got.n, notes[j - 1].n + 1, where);
        else if (remembers) assert.equal(got.n, before + 1, where);
        else assert.ok(got.n <= before + 1, `${where}, first heard ${got.n}`);
      });
    });
  }
}

test("mail survives the death of either side", { timeout: 60_000 }, async (t) => {
  const watch = new Watch(t);
  const appID = await meet();
  const apps = [new App(appID, "A", watch), new App(appID, "B", watch)];
  const [a, b] = apps;
  t.after(() => apps.forEach((app) => app.life?.kill()));

  await a.start(true);
  await b.start(true);
  const talking = Promise.all([a.talk(b), b.talk(a)]);
  const killing = (async () => {
    for (let i = 0; i < 16; i++) {
      const victim = apps[i % 2];
      const next = victim.heard + randomInt(1, 40);
      await watch.until(() => victim.heard >= Math.min(next, NOTES), `${victim.side} to hear note ${next}`);
      await victim.die();
      await sleep(randomInt(60));
      await victim.start(randomInt(2) === 0);
    }
  })();
  await Promise.all([talking, killing]);
  const everyone = () => a.heard === b.sent && b.heard === a.sent;
  await watch.until(everyone, "the last notes");
  a.check(b, NOTES);
  b.check(a, NOTES);
  assert.ok(a.roomFull > 0 && b.roomFull > 0, "both were told room_full");

  // What was acknowledged does not come again, not even to who forgot it all.
  for (const app of apps) {
    await app.settle();
    app.life.kill();
    await app.start(false);
  }
  await Promise.all([a.talk(b, NOTES + 1), b.talk(a, NOTES + 1)]);
  await watch.until(everyone, "one more note");
  for (const app of apps) {
    assert.deepEqual(app.lives.at(-1).notes.map(({ n }) => n), [NOTES + 1]);
  }
  const heard = apps.map((app) => app.lives.reduce((sum, life) => sum + life.notes.length, 0));
  t.diagnostic(`${NOTES + 1} notes each way in ${a.lives.length + b.lives.length} lives, with repeats ${heard}`);
});

// A Numbered client does what the documentation asks of one that must not lose
// anything it sent: it numbers its mail, keeps what was not answered `queued`,
// and sends that again after a drop.
class Numbered {
  log = []; // the payloads heard, in order
  #ids = 0;
  #unstored = new Map();
  #watermark = 0;

  constructor(appID, side, watch) {
    Object.assign(this, { side, watch });
    this.url = `${wsBase}?appID=${appID}&side=${side}&sid=${randomUUID()}`;
  }

  start() {
    this.watch.check();
    const socket = (this.socket = new WebSocket(this.url));
    const mine = (act) => (...args) => socket === this.socket && act(...args);
    socket.on("error", () => {});
    socket.on("open", mine(() => {
      this.#write({ type: "hello", deliveredUpTo: this.#watermark });
      for (const [id, payload] of this.#unstored) this.#write({ type: "send", id, payload });
    }));
    socket.on("message", mine((data) => this.#read(JSON.parse(data))));
    socket.on("close", mine((code, reason) =>
      this.watch.fail(`the server closed ${this.side} with ${code} ${reason}`)));
  }

  kill() {
    const { socket } = this;
    this.socket = null;
    socket?.terminate();
  }

  get waiting() {
    return this.#unstored.size;
  }

  send(payload) {
    const id = ++this.#ids;
    this.#unstored.set(id, payload);
    this.#write({ type: "send", id, payload });
  }

  #write(frame) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(frame));
  }

  #read(frame) {
    if (frame.type === "queued") this.#unstored.delete(frame.id);
    if (frame.type === "error") this.watch.fail(`${this.side} was told ${JSON.stringify(frame)}`);
    if (frame.type !== "deliver" || frame.seq <= this.#watermark) return;
    this.log.push(frame.payload);
    this.#watermark = frame.seq;
    if (randomInt(8) === 0) this.#write({ type: "delivered", upTo: frame.seq });
  }

  async talk(peer) {
    for (let n = 1; n <= NOTES; n++) {
      await this.watch.until(() => n - peer.log.length <= WINDOW, `${peer.side} to hear ${this.side}`);
      this.send(n);
      if (n % 8 === 0) await nextTurn();
    }
  }
}

test("numbered mail arrives exactly once, whenever its sender dies", { timeout: 60_000 }, async (t) => {
  const watch = new Watch(t);
  const appID = await meet();
  const clients = [new Numbered(appID, "A", watch), new Numbered(appID, "B", watch)];
  const [a, b] = clients;
  t.after(() => clients.forEach((client) => client.kill()));

  clients.forEach((client) => client.start());
  const talking = Promise.all([a.talk(b), b.talk(a)]);
  const killing = (async () => {
    for (let i = 0; i < 16; i++) {
      const victim = clients[i % 2];
      const next = victim.log.length + randomInt(1, 40);
      await watch.until(() => victim.log.length >= Math.min(next, NOTES), `${victim.side} to hear note ${next}`);
      victim.kill();
      await sleep(randomInt(60));
      victim.start();
    }
  })();
  await Promise.all([talking, killing]);
  const everything = () => clients.every((client) => client.log.length >= NOTES && client.waiting === 0);
  await watch.until(everything, "the last notes");

  const all = Array.from({ length: NOTES }, (_, i) => i + 1);
  assert.deepEqual(a.log, all, "what A heard");
  assert.deepEqual(b.log, all, "what B heard");
});

test("two clients with one sid do not fight for ever", { timeout: 60_000 }, async (t) => {
  const watch = new Watch(t);
  const appID = await meet();
  const seat = { room: appID, side: "A", sessionId: randomUUID() };
  const rivals = [new Life(), new Life()];
  const friend = new Life();
  t.after(() => [...rivals, friend].forEach((life) => life.kill()));
  await rivals[0].transport(seat);
  await rivals[0].settle(watch);
  await rivals[1].transport(seat);
  const tx = await friend.transport({ room: appID, side: "B", sessionId: randomUUID() });

  // The published client comes back a quarter of a second after every close,
  // so the two take the seat from each other until one is told to wait.
  const closed = (code) => rivals.flatMap((rival) => rival.closes).filter((c) => c === code).length;
  await watch.until(() => closed(4429) > 0, "a rival to be closed with 4429");
  const takeovers = closed(4500);
  assert.ok(takeovers <= 6, `${takeovers} takeovers before the first 4429`);

  await sleep(3000);
  assert.equal(closed(4500), takeovers, "takeovers went on");
  const others = rivals.flatMap((rival) => rival.closes).filter((code) => code !== 4500 && code !== 4429);
  assert.deepEqual(others, [], "close codes that have no place here");

  // Whoever holds the seat now has its mail.
  tx.send({ n: 1 });
  const delivered = (rival) => rival.frames.some((frame) => frame.type === "deliver");
  await watch.until(() => rivals.some(delivered), "the mail", 5000);
});

test("a session ID is not required", { timeout: 60_000 }, async (t) => {
  const watch = new Watch(t);
  const room = await meet();
  const heard = { A: [], B: [] };
  for (const side of ["A", "B"]) {
    const life = new Life();
    t.after(() => life.kill());
    const tx = await life.transport({ room, side }); // which asks for an empty sid
    tx.onMessage((message) => heard[side].push(message));
    tx.onClose(({ code, reason }) => watch.fail(`the server closed ${side} with ${code} ${reason}`));
    tx.send(note(side, 1)); // waits in the client until it is connected
  }
  for (const [side, other] of [["A", "B"], ["B", "A"]]) {
    await watch.until(() => heard[side].some((message) => message.n === 1), `${side} to hear ${other}`);
    assert.deepEqual(heard[side].filter((message) => message.n !== undefined), [note(other, 1)]);
  }
});
