// web/transfer.js over channels in memory: files that arrive, and everything
// that keeps one from arriving and must leave the next alone.

import assert from "node:assert/strict";
import { resolveObjectURL } from "node:buffer";
import { createHash, randomBytes } from "node:crypto";
import { afterEach, test } from "node:test";

import { Transfer } from "../../web/transfer.js";
import { channelPair } from "./fakes.mjs";
import { until } from "./support.mjs";

const MiB = 1 << 20;
const CHUNK = 256 * 1024;
const WINDOW = 64 * MiB;

// Transfers that are under way keep a timer.
const transfers = [];
afterEach(() => transfers.splice(0).forEach((transfer) => transfer.close("The test is over.")));

function newTransfer(options) {
  const transfer = new Transfer(options);
  transfers.push(transfer);
  return transfer;
}

const file = (name, content) => new File([content], name);
const sum = (bytes) => createHash("sha256").update(bytes).digest("hex");

// pair returns both ends of a transfer: { channel, transfer, out(name), in(name) }.
function pair(optionsA = {}, optionsB = {}) {
  const channels = channelPair();
  return [optionsA, optionsB].map((options, i) => {
    const transfer = newTransfer({ channel: channels[i], ...options });
    const find = (direction) => (name) => transfer.items.find((item) => item.direction === direction && item.name === name);
    return { channel: channels[i], transfer, out: find("out"), in: find("in") };
  });
}

// against returns an end of a transfer, and a channel whose test says what it likes.
function against(options = {}) {
  const [channel, raw] = channelPair();
  const transfer = newTransfer({ channel, ...options });
  const heard = [];
  raw.addEventListener("message", ({ data }) => heard.push(typeof data === "string" ? JSON.parse(data) : data.byteLength));
  return { transfer, heard, channel, say: (message) => raw.send(message instanceof Uint8Array ? message : JSON.stringify(message)) };
}

const offer = (id, size, name = id) => ({ t: "offer", id, name, size, type: "" });

const becomes = (find, state, note = /^/) =>
  until(`an item is ${state}, ${note}`, () => {
    const item = find();
    return item?.state === state && note.test(item.note);
  }, 5_000);

const content = async (item) => Buffer.from(await resolveObjectURL(item.url).arrayBuffer());

// arrives sees that a file sent from one end arrives at the other: the channel is still in step.
async function arrives(from, to, name = "next") {
  const bytes = randomBytes(100_000);
  from.transfer.send([file(name, bytes)]);
  await becomes(() => from.out(name), "done");
  assert.deepEqual(await content(to.in(name)), bytes);
}

// A disk that takes writes one at a time, when the test says so.
function slowDisk() {
  const disk = { bytes: 0, end: null, writing: null };
  disk.writable = {
    write: (bytes) => new Promise((resolve, reject) => (disk.writing = { reject, resolve: () => ((disk.bytes += bytes.length), resolve()) })),
    close: async () => void (disk.end = "closed"),
    abort: async () => void (disk.end = "aborted"),
  };
  return disk;
}

const quickDisk = (change = {}) => {
  const disk = { parts: [], end: null };
  disk.writable = {
    write: async (bytes) => void disk.parts.push(bytes.slice()),
    close: async () => void (disk.end = "closed"),
    abort: async () => void (disk.end = "aborted"),
    ...change,
  };
  return disk;
};

test("files go both ways at once, and are hashed at both ends", async () => {
  const [a, b] = pair();
  const [one, other] = [randomBytes(9 * MiB + 1), randomBytes(5 * MiB)];
  a.transfer.send([file("one", one), file("empty", "")]);
  b.transfer.send([file("other", other)]);
  await Promise.all([becomes(() => a.out("one"), "done"), becomes(() => a.out("empty"), "done"), becomes(() => b.out("other"), "done")]);
  assert.deepEqual(await content(b.in("one")), one);
  assert.deepEqual(await content(a.in("other")), other);
  assert.equal((await content(b.in("empty"))).length, 0);
  for (const item of [a.out("one"), b.in("one")]) assert.equal(item.sha256, sum(one));
  assert.equal(a.transfer.active, false);
});

test("files come in the order in which they were accepted", async () => {
  const [a, b] = pair({}, { askFirst: () => true });
  const contents = { first: randomBytes(MiB), second: randomBytes(300), third: randomBytes(MiB + 7) };
  a.transfer.send(Object.entries(contents).map(([name, bytes]) => file(name, bytes)));
  await until("all are offered", () => b.in("third"));
  const done = [];
  a.transfer.addEventListener("update", ({ detail }) => detail.state === "done" && done.push(detail.name));
  for (const name of ["third", "first", "second"]) b.transfer.accept(b.in(name));
  await until("all are done", () => done.length === 3);
  assert.deepEqual(done, ["third", "first", "second"]);
  for (const [name, bytes] of Object.entries(contents)) assert.deepEqual(await content(b.in(name)), bytes);
});

test("a cancel on the way, by either or by both, leaves the next file alone", async () => {
  for (const by of ["sender", "receiver", "both"]) {
    const [a, b] = pair();
    let chunks = 0;
    a.channel.change = (data) => {
      if (typeof data !== "string" && ++chunks === 8) a.channel.hold();
      return data;
    };
    a.transfer.send([file("long", randomBytes(12 * MiB)), file("second", "2")]);
    await until("the buffer is full", () => a.channel.bufferedAmount > 4 * MiB);
    if (by !== "receiver") a.transfer.cancel(a.out("long"));
    if (by !== "sender") b.transfer.cancel(b.in("long"));
    a.channel.flow();
    await becomes(() => a.out("long"), "cancelled", by === "receiver" ? /by the other device/ : /^Cancelled$/);
    await becomes(() => b.in("long"), "cancelled", by === "sender" ? /by the other device/ : /^Cancelled$/);
    await becomes(() => b.in("second"), "done");
    await arrives(a, b);
    await arrives(b, a);
  }
});

test("a file that was accepted and waits its turn can be cancelled by either", async () => {
  const [a, b] = pair();
  a.transfer.send([file("long", randomBytes(9 * MiB)), file("x", "1"), file("y", "2"), file("z", "3")]);
  await until("all are offered", () => b.in("z"));
  b.transfer.cancel(b.in("x"));
  a.transfer.cancel(a.out("y"));
  await becomes(() => b.in("z"), "done");
  for (const name of ["x", "y"]) for (const item of [a.out(name), b.in(name)]) assert.equal(item.state, "cancelled");
  await becomes(() => a.out("long"), "done");
});

test("an offer is declined, or taken back", async () => {
  const [a, b] = pair({}, { askFirst: ({ name }) => name !== "next" });
  a.transfer.send([file("declined", "1"), file("taken back", "2")]);
  await until("both are offered", () => b.in("taken back")?.waiting);
  b.transfer.cancel(b.in("declined"));
  a.transfer.cancel(a.out("taken back"));
  await becomes(() => a.out("declined"), "cancelled", /Declined by the other device/);
  await becomes(() => b.in("taken back"), "cancelled", /by the other device/);
  await arrives(a, b);
});

test("a chunk that was damaged on the way is found out", async () => {
  const [a, b] = pair();
  let damaged = false;
  a.channel.change = (data) => {
    if (typeof data !== "string" && !damaged) data[data.length >> 1] ^= (damaged = true) && 1;
    return data;
  };
  a.transfer.send([file("damaged", randomBytes(3 * MiB))]);
  await becomes(() => b.in("damaged"), "failed", /checksum/);
  await becomes(() => a.out("damaged"), "failed", /damaged/);
  assert.equal(b.in("damaged").url, null);
  await arrives(a, b);
});

test("a sender that sends something else than it offered gets nothing stored", async () => {
  const cases = {
    "too much": [new Uint8Array(11)],
    "too much at once": [new Uint8Array(2 * MiB)],
    "too little": [new Uint8Array(9), { t: "done", id: "x", sha256: sum(new Uint8Array(9)) }],
    "another checksum": [new Uint8Array(10), { t: "done", id: "x", sha256: sum(new Uint8Array(9)) }],
    "no checksum": [new Uint8Array(10), { t: "done", id: "x" }],
  };
  for (const [what, messages] of Object.entries(cases)) {
    const { transfer, heard, say } = against();
    say(offer("x", what === "too much at once" ? 4 * MiB : 10));
    messages.forEach(say);
    await until(`${what} is refused`, () => heard.some(({ t }) => t === "bad"));
    assert.equal(transfer.items[0].state, "failed", what);
    assert.equal(transfer.items[0].url, null, what);
  }
});

test("messages that fit nothing end nothing, or the connection", async () => {
  const { transfer, heard, say } = against();
  for (const t of ["accept", "got", "done", "cancel", "ok", "bad", "other"]) say({ t, id: "unknown", bytes: 5, sha256: "x" });
  say(null);
  for (const wrong of [{ id: 7 }, { id: "" }, { id: "with space" }]) say({ ...offer("x", 1), ...wrong });
  for (const wrong of [{ size: -1 }, { size: 0.5 }, { size: "1" }, { size: 2 ** 60 }, { name: 7 }]) say({ ...offer("bad", 1), ...wrong });
  await until("what was offered wrongly is turned down", () => heard.length === 5);
  assert.ok(heard.every(({ t, id }) => t === "cancel" && id === "bad"));
  assert.equal(transfer.items.length, 0);
  say(offer("good", 0));
  await until("the next is accepted", () => heard.at(-1).t === "accept");
  say({ t: "done", id: "good", sha256: sum("") });
  await becomes(() => transfer.items[0], "done");
  say(new Uint8Array(1)); // of no file
  transfer.send([file("later", "1")]);
  await becomes(() => transfer.items.find(({ name }) => name === "later"), "failed");
});

test("a file whose turn it is not cannot be finished, nor the same one twice", async () => {
  const { transfer, heard, say } = against();
  say(offer("first", 1));
  say(offer("second", 0));
  await until("both are accepted", () => heard.length === 2);
  say({ t: "done", id: "second", sha256: sum("") });
  say(new Uint8Array(1));
  for (let twice = 0; twice < 2; twice++) say({ t: "done", id: "first", sha256: sum(new Uint8Array(1)) });
  say({ t: "done", id: "second", sha256: sum("") });
  await becomes(() => transfer.items[1], "done");
  assert.deepEqual(heard.slice(2), [{ t: "ok", id: "first" }, { t: "ok", id: "second" }]);
});

test("a receiver that claims what it does not have is not believed", async () => {
  const { transfer, heard, say } = against();
  transfer.send([file("x", new Uint8Array(1000))]);
  await until("it is offered", () => heard.length === 1);
  const { id } = heard[0];
  say({ t: "ok", id }); // before it was sent
  say({ t: "accept", id });
  say({ t: "accept", id }); // twice
  say({ t: "got", id, bytes: 2 ** 40 });
  await until("it is sent", () => heard.at(-1).t === "done");
  assert.equal(transfer.items[0].state, "active");
  assert.equal(heard.filter((message) => typeof message === "number").length, 1);
  say({ t: "ok", id });
  await becomes(() => transfer.items[0], "done");
});

test("what a slow receiver has not stored yet is bounded", async () => {
  const [a, b] = pair({}, { askFirst: () => true });
  const disk = slowDisk();
  const size = WINDOW + 8 * MiB;
  a.transfer.send([file("large", new Uint8Array(size))]);
  await until("it is offered", () => b.in("large"));
  b.transfer.accept(b.in("large"), disk.writable);
  await until("the window is full", () => b.in("large").bytes >= WINDOW);
  for (let turn = 0; turn < 100; turn++) await new Promise(setImmediate);
  assert.ok(a.out("large").sent <= WINDOW + CHUNK, `${a.out("large").sent} bytes were sent, none is stored`);
  await until("all of it is stored", async () => {
    for (let turn = 0; turn < 1000 && disk.end === null; turn++) {
      disk.writing?.resolve();
      await new Promise(setImmediate);
    }
    return disk.end !== null;
  });
  assert.deepEqual([disk.end, disk.bytes], ["closed", size]);
  await becomes(() => a.out("large"), "done");
});

test("a file goes to disk as it was", async () => {
  const [a, b] = pair({}, { askFirst: () => true });
  const bytes = randomBytes(3 * MiB + 5);
  const disk = quickDisk();
  a.transfer.send([file("x", bytes)]);
  await until("it is offered", () => b.in("x"));
  b.transfer.accept(b.in("x"), disk.writable);
  await becomes(() => a.out("x"), "done");
  assert.deepEqual(Buffer.concat(disk.parts), bytes);
  assert.equal(disk.end, "closed");
  assert.equal(b.in("x").url, null);
});

test("a disk that fails ends its file only", async () => {
  const fails = (name) => async () => {
    throw new DOMException("no", name);
  };
  const cases = [
    [{ write: fails("QuotaExceededError") }, /There is no room for it on this device/],
    [{ write: fails("NotAllowedError") }, /could not be stored/],
    [{ close: fails("QuotaExceededError") }, /There is no room for it on this device/],
  ];
  for (const [change, note] of cases) {
    const [a, b] = pair({}, { askFirst: ({ name }) => name === "x" });
    const disk = quickDisk(change);
    a.transfer.send([file("x", randomBytes(5 * MiB))]);
    await until("it is offered", () => b.in("x"));
    b.transfer.accept(b.in("x"), disk.writable);
    await becomes(() => b.in("x"), "failed", note);
    await becomes(() => a.out("x"), "cancelled", /by the other device/);
    assert.equal(disk.end, "aborted");
    await arrives(a, b);
  }
});

test("a disk gives its file up at once when the transfer is cancelled, though it is still writing", async () => {
  const [a, b] = pair({}, { askFirst: () => true });
  const disk = slowDisk();
  a.transfer.send([file("x", randomBytes(5 * MiB))]);
  await until("it is offered", () => b.in("x"));
  b.transfer.accept(b.in("x"), disk.writable);
  await until("it is writing", () => disk.writing);
  b.transfer.cancel(b.in("x"));
  assert.equal(disk.end, "aborted");
  const last = disk.writing;
  last.resolve();
  for (let turn = 0; turn < 10; turn++) await new Promise(setImmediate);
  assert.equal(disk.writing, last, "nothing more is written");
});

test("a file that cannot be read fails, and the next goes", async () => {
  const [a, b] = pair();
  const gone = Object.assign(file("gone", "1234"), { slice: () => ({ arrayBuffer: async () => Promise.reject(new DOMException("gone", "NotFoundError")) }) });
  const shorter = Object.assign(file("shorter", "1234"), { slice: () => new Blob([]) });
  a.transfer.send([gone, shorter]);
  for (const name of ["gone", "shorter"]) {
    await becomes(() => a.out(name), "failed", /could not be read/);
    await becomes(() => b.in(name), "cancelled");
  }
  await arrives(a, b);
});

test("at most a hundred offers wait, and two hundred are taken", async () => {
  const [a, b] = pair({}, { askFirst: () => true });
  a.transfer.send(Array.from({ length: 150 }, (_, i) => file(`file ${i}`, "x")));
  await until("a hundred are offered", () => b.transfer.items.length === 100);
  for (const item of b.transfer.items.slice(0, 60)) b.transfer.accept(item);
  await until("the others follow", () => b.transfer.items.length === 150);
  assert.equal(a.transfer.items.filter(({ state }) => state === "cancelled").length, 0);

  const { transfer, heard, say } = against({ askFirst: () => true });
  for (let i = 0; i < 250; i++) say(offer(`id${i}`, 1));
  await until("the rest is turned down", () => heard.length === 50);
  assert.ok(heard.every(({ t }) => t === "cancel"));
  assert.equal(transfer.items.length, 200);
});

test("names cannot pretend to be something else", async () => {
  const names = {
    "../../etc/passwd": ".._.._etc_passwd",
    "C:\\boot.ini": "C:_boot.ini",
    "photo\u202egpj.exe": "photogpj.exe",
    "a\u0000b\nc\u007f": "abc",
    "  ": "file",
    "\u2066\u2069": "file",
    [`${"x".repeat(300)}.jpg`]: `${"x".repeat(196)}.jpg`,
    "naïve – 文件.txt": "naïve – 文件.txt",
  };
  const { transfer, say } = against();
  for (const [i, name] of Object.keys(names).entries()) say(offer(`id${i}`, 0, name));
  await until("all came", () => transfer.items.length === Object.keys(names).length);
  assert.deepEqual(transfer.items.map(({ name }) => name), Object.values(names));
});

test("nothing goes while it is held, and all of it after", async () => {
  const [a, b] = pair({ held: true }, { held: true });
  a.transfer.send([file("x", "1")]);
  b.transfer.send([file("y", "2")]);
  for (let turn = 0; turn < 20; turn++) await new Promise(setImmediate);
  assert.deepEqual([a.channel.sent, b.channel.sent], [[], []]);
  a.transfer.release(); // b, which is slower, keeps what a says
  await until("a has offered", () => a.channel.sent.length === 1);
  for (let turn = 0; turn < 20; turn++) await new Promise(setImmediate);
  assert.deepEqual(b.transfer.items.map(({ name }) => name), ["y"]);
  b.transfer.release();
  await Promise.all([becomes(() => a.out("x"), "done"), becomes(() => b.out("y"), "done")]);

  const { transfer, say } = against({ held: true });
  transfer.send([file("z", "3")]);
  for (let i = 0; i < 250; i++) say(offer(`id${i}`, 1));
  await becomes(() => transfer.items[0], "failed", /too much/);
});

test("the end of the channel fails what is under way, and keeps what is done", async () => {
  const [a, b] = pair();
  await arrives(a, b, "done before");
  a.transfer.send([file("long", randomBytes(9 * MiB)), file("waiting", "1")]);
  await until("it is on its way", () => b.in("long")?.bytes > 0);
  a.channel.close();
  for (const find of [() => a.out("long"), () => a.out("waiting"), () => b.in("long")]) await becomes(find, "failed", /connection to the other device was lost/);
  assert.equal(b.in("done before").state, "done");
  a.transfer.send([file("too late", "1")]);
  await becomes(() => a.out("too late"), "failed", /no connection/);
  assert.ok(a.out("too late").file, "it can be sent again");
});
