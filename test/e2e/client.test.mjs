// web/parley.js against a real server, as far as it needs no browser: codes,
// presence, mail and rooms, while connections are killed.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { once } from "node:events";
import http from "node:http";
import { test } from "node:test";

import WebSocket from "ws";

import { ParleyError, changeRoom, connect, deleteRoom, getRoom, joinRoom, mint, openRoom, redeem } from "../../web/parley.js";
import { next, startNetwork, startParley, until } from "./support.mjs";

globalThis.WebSocket = WebSocket;
globalThis.crypto ??= (await import("node:crypto")).webcrypto;

const rejects = (promise, code, status) =>
  assert.rejects(promise, (error) => {
    assert.ok(error instanceof ParleyError, String(error));
    assert.equal(error.code, code);
    assert.equal(error.status, status);
    assert.ok(error.message.length > 5);
    return true;
  });

// inbox collects the mail of a session.
function inbox(session) {
  const got = [];
  session.addEventListener("message", ({ detail }) => got.push(detail.payload));
  return got;
}

// open connects, and closes at the end of the test.
function open(t, options) {
  const session = connect(options);
  t.after(() => session.close());
  return session;
}

test("codes", async (t) => {
  const { url: server } = await startParley(t, { STUN_URLS: "stun:stun.example", REDEEM_FAILS: "3" });
  const minted = await mint({ server, ttl: 60 });
  assert.match(minted.code, /^\d{4}$/);
  assert.ok(minted.expiresAt - Date.now() > 50_000 && minted.expiresAt - Date.now() <= 60_000);
  assert.deepEqual(minted.iceServers, [{ urls: ["stun:stun.example"] }]);
  const redeemed = await redeem(minted.code, { server });
  assert.equal(redeemed.appID, minted.appID);
  await rejects(redeem(minted.code, { server }), "gone", 410);
  await rejects(redeem("12", { server }), "bad_code", 400);
  await rejects(mint({ server, ttl: -1 }), "bad_ttl", 400);
  for (const code of ["000000000", "000000001"]) await rejects(redeem(code, { server }), "gone", 410);
  await assert.rejects(redeem("000000002", { server }), (error) => error.code === "too_many_attempts" && error.retryAfter > 0);
  await rejects(mint({ server: "http://127.0.0.1:1" }), "network", 0);
  const abort = AbortSignal.abort(new Error("enough"));
  await assert.rejects(mint({ server, signal: abort }), /enough/);
});

test("a network that has used up its share of TURN is told", async (t) => {
  const { url: server } = await startParley(t, { TURN_URLS: "turn:turn.example", TURN_SECRET: "s" });
  const { appID: first } = await mint({ server });
  for (let i = 1; i < 30; i++) await mint({ server });
  const { appID: last } = await mint({ server });
  for (const [appID, throttled] of [[first, false], [last, true]]) {
    const session = open(t, { server, appID, side: "A" });
    await next(session, "open");
    assert.equal(session.throttled, throttled);
    assert.equal(session.iceServers.length, throttled ? 0 : 1);
  }
});

test("presence of the other side", async (t) => {
  const { url: server } = await startParley(t, { RESUME_TTL: "2s" });
  const network = await startNetwork(t, Number(new URL(server).port));
  const appID = randomUUID();
  const a = open(t, { server, appID, side: "A" });
  const seen = [];
  a.addEventListener("presence", ({ detail }) => seen.push(`${detail.presence} ${detail.resumed}`));
  await next(a, "open");
  const b = open(t, { server: network.url, appID, side: "B" });
  await until("B there", () => seen.length === 2);
  network.kill();
  await until("B away and back", () => seen.length === 4);
  assert.equal(b.presence, "present");
  network.cut();
  await until("B gone", () => seen.length === 6);
  network.mend();
  await until("B back anew", () => seen.length === 7);
  b.close();
  await until("B left", () => seen.length === 8);
  assert.deepEqual(seen, ["absent false", "present false", "away false", "present true", "away false", "absent false", "present false", "absent false"]);
  assert.equal(b.state, "closed");
  await rejects(b.send("late"), "closed", 0);
});

test("who closes while it connects leaves for good", async (t) => {
  const { url: server } = await startParley(t);
  const appID = randomUUID();
  const a = open(t, { server, appID, side: "A" });
  await next(a, "open");
  for (let i = 0; i < 5; i++) {
    const [came, left] = [next(a, "presence"), next(a, "presence", ({ presence }) => presence !== "present")];
    connect({ server, appID, side: "B" }).close();
    assert.equal((await came).presence, "present");
    assert.equal((await left).presence, "absent");
  }
});

test("mail arrives once and in order while connections are killed", async (t) => {
  const { url: server, port } = await startParley(t);
  const networks = [await startNetwork(t, port), await startNetwork(t, port)];
  const appID = randomUUID();
  const [a, b] = ["A", "B"].map((side, i) => open(t, { server: networks[i].url, appID, side }));
  const [toA, toB] = [inbox(a), inbox(b)];
  const count = 250; // fits into a mailbox: what a full one refuses comes later
  let killing = true;
  const killer = (async () => {
    for (let i = 0; killing; i++) {
      networks[i % 2].kill();
      await new Promise((resolve) => setTimeout(resolve, 700)); // fewer than the takeovers that are allowed
    }
  })();
  const receipts = [];
  for (let i = 0; i < count; i++) {
    receipts.push(a.send({ i, from: "A" }), b.send({ i, from: "B" }));
    if (i % 5 === 0) await new Promise((resolve) => setTimeout(resolve, 40));
  }
  const seqs = await Promise.all(receipts);
  assert.ok(seqs.every(({ seq }) => seq > 0));
  await until("all mail", () => toA.length >= count && toB.length >= count);
  killing = false;
  await killer;
  assert.deepEqual(toA, Array.from({ length: count }, (_, i) => ({ i, from: "B" })));
  assert.deepEqual(toB, Array.from({ length: count }, (_, i) => ({ i, from: "A" })));
});

test("mail for who is not there yet, more than a mailbox holds", async (t) => {
  const { url: server } = await startParley(t);
  const appID = randomUUID();
  const a = open(t, { server, appID, side: "A" });
  const sent = Array.from({ length: 300 }, (_, i) => a.send(i));
  await sent[255];
  const b = open(t, { server, appID, side: "B" });
  const got = inbox(b);
  await Promise.all(sent);
  await until("all mail", () => got.length === 300);
  assert.deepEqual(got, Array.from({ length: 300 }, (_, i) => i));
});

test("mail waits for a server that is not there yet, and is refused when it is too large", async (t) => {
  const { url, port, stop } = await startParley(t, { WS_MAX_MSG: "2048" });
  await stop();
  const appID = randomUUID();
  const a = open(t, { server: url, appID, side: "A" });
  const early = a.send("early");
  await next(a, "offline");
  await startParley(t, { WS_MAX_MSG: "2048" }, port);
  await early;
  await rejects(a.send("x".repeat(3000)), "too_large", 0);
  await rejects(a.send("\u{1f40c}".repeat(500)), "too_large", 0); // 1,000 characters of a JavaScript string, 2,000 bytes
  await a.send(undefined); // JSON has no undefined
  const b = open(t, { server: url, appID, side: "B" });
  const got = inbox(b);
  await until("mail", () => got.length === 2);
  assert.deepEqual(got, ["early", null]);
});

test("a page that is loaded again goes on in its seat, and its mail is not taken for a repetition", async (t) => {
  const { url: server } = await startParley(t);
  const network = await startNetwork(t, Number(new URL(server).port));
  const appID = randomUUID();
  const b = open(t, { server, appID, side: "B" });
  const got = inbox(b);
  const sent = [];
  for (let load = 0; load < 4; load++) {
    const a = connect({ server: network.url, appID, side: "A", sid: "kept" });
    for (let i = 0; i < 3; i++) {
      sent.push(`${load}.${i}`);
      await a.send(`${load}.${i}`);
    }
    // A page that goes away says nothing, and never comes back to this session.
    network.kill();
    await next(a, "offline");
    a.close();
  }
  await until("all mail", () => got.length >= sent.length);
  assert.deepEqual(got, sent);
});

test("what is too large is refused also when it was sent too early to know", async (t) => {
  const { url: server } = await startParley(t, { WS_MAX_MSG: "2048" });
  const a = open(t, { server, appID: randomUUID(), side: "A" });
  const [before, large, after] = [a.send("before"), a.send("x".repeat(3000)), a.send("after")];
  await rejects(large, "too_large", 0);
  await Promise.all([before, after]);
});

test("what waits for a server is bounded", async (t) => {
  const a = open(t, { server: "http://127.0.0.1:1", appID: randomUUID(), side: "A" });
  const waiting = Array.from({ length: 10_000 }, (_, i) => a.send(i));
  await rejects(a.send("one more"), "mailbox_full", 0);
  a.close();
  for (const sent of waiting) await rejects(sent, "closed", 0);
});

test("options that cannot be right", () => {
  const appID = randomUUID();
  const refuses = (make, code) => assert.throws(make, (error) => error instanceof ParleyError && error.code === code);
  refuses(() => connect({ appID: "6f0c", side: "A" }), "bad_app_id");
  refuses(() => connect({ appID, side: "C" }), "bad_side");
  refuses(() => connect({ appID, side: "A", sid: "" }), "bad_sid");
  refuses(() => connect({ appID, side: "A", sid: "é".repeat(65) }), "bad_sid");
  refuses(() => joinRoom({ room: "ABCDEF", displayName: "x".repeat(65) }), "bad_display_name");
  refuses(() => joinRoom({ room: "ABCDEF", displayName: "a\nb" }), "bad_display_name");
  refuses(() => joinRoom({}), "room_not_found");
});

test("times are by this device's clock", async (t) => {
  const hour = 3_600_000;
  for (const ahead of [-hour, 0, hour]) {
    const other = http.createServer((request, response) => {
      const now = Date.now() - ahead;
      response.setHeader("Date", new Date(now).toUTCString());
      response.end(JSON.stringify({ code: "1234", appID: randomUUID(), expiresAt: new Date(now + 60_000) }));
    });
    other.listen(0, "127.0.0.1");
    t.after(() => other.close());
    await once(other, "listening");
    const { expiresAt } = await mint({ server: `http://127.0.0.1:${other.address().port}` });
    const left = expiresAt - Date.now();
    assert.ok(left > 50_000 && left < 65_000, `${left} ms left by a clock that is ${ahead} ms ahead`);
  }
});

test("a server that was restarted knows nothing, and is met anew", async (t) => {
  const first = await startParley(t);
  const appID = randomUUID();
  const [a, b] = ["A", "B"].map((side) => open(t, { server: first.url, appID, side }));
  const got = inbox(b);
  await a.send(1);
  await until("mail", () => got.length === 1);
  await first.stop("SIGKILL");
  await startParley(t, {}, first.port);
  await a.send(2);
  await until("mail after the restart", () => got.length === 2);
  assert.deepEqual(got, [1, 2]);
});

test("what ends a session for good", async (t) => {
  const { url: server } = await startParley(t, { APP_IDS: "minted" });
  const unknown = open(t, { server, appID: randomUUID(), side: "A" });
  assert.equal((await next(unknown, "close")).error.code, "unknown_session");
  await rejects(unknown.send(1), "closed", 0);

  const { appID } = await mint({ server });
  const first = open(t, { server, appID, side: "A", sid: "mine" });
  await next(first, "open");
  const other = open(t, { server, appID, side: "A" });
  assert.equal((await next(other, "close")).error.code, "busy");
  const again = open(t, { server, appID, side: "A", sid: "mine" });
  const opened = next(again, "open"); // before or after the other hears of it
  assert.equal((await next(first, "close")).error.code, "taken_over");
  await opened;
  assert.equal(again.state, "open");
});

test("a contested code is told", async (t) => {
  const { url: server } = await startParley(t);
  const { code, appID } = await mint({ server });
  await redeem(code, { server });
  const a = open(t, { server, appID, side: "A" });
  await next(a, "open");
  const told = next(a, "contested");
  await rejects(redeem(code, { server }), "gone", 410);
  await told;
});

test("rooms", async (t) => {
  const { url: server, port } = await startParley(t, { ROOMS: "open", RESUME_TTL: "20s" });
  const network = await startNetwork(t, port);
  const { roomId, code, ownerToken } = await openRoom({ server, maxPlayers: 3, password: "tea" });
  const info = await getRoom(code.toLowerCase(), { server });
  assert.deepEqual([info.id, info.maxPlayers, info.playerCount, info.hasPassword], [roomId, 3, 0, true]);
  assert.ok(info.createdAt instanceof Date && info.expiresAt > info.createdAt);

  const join = (options) => {
    const room = joinRoom({ room: code, password: "tea", server, ...options });
    t.after(() => room.close());
    return room;
  };
  const wrong = join({ password: "milk" });
  assert.equal((await next(wrong, "close")).error.code, "wrong_password");

  const ada = join({ displayName: "Ada" });
  await next(ada, "open");
  const bob = join({ displayName: "Bob", server: network.url });
  const [seen] = await Promise.all([next(ada, "join"), next(bob, "open")]);
  assert.deepEqual(seen, { id: bob.self.id, displayName: "Bob" });
  const eve = join({ displayName: "Eve" });
  await until("three", () => ada.members.size === 2 && bob.members.size === 2 && eve.members.size === 2);
  assert.deepEqual([...eve.members.values()].map((m) => m.displayName), ["Ada", "Bob"]);
  const full = join({ displayName: "Max" });
  assert.equal((await next(full, "close")).error.code, "room_is_full");

  // Bob's network goes and comes: he is the same, and nobody has seen anything.
  const changes = [];
  for (const type of ["join", "leave", "host"]) for (const room of [ada, eve]) room.addEventListener(type, () => changes.push(type));
  const bobID = bob.self.id;
  const back = next(bob, "open");
  network.kill();
  assert.deepEqual(await back, { resumed: true });
  assert.equal(bob.self.id, bobID);

  // The host leaves: all agree on the next.
  assert.equal(bob.host, ada.self.id);
  ada.close();
  await until("the next host", () => bob.host === bobID && eve.host === bobID);
  assert.deepEqual(changes.sort(), ["host", "leave"]);
  assert.equal(bob.members.size, 1);

  const locked = await changeRoom(roomId, { locked: true }, { server, token: ownerToken });
  assert.equal(locked.locked, true);
  await rejects(changeRoom(roomId, { locked: false }, { server, token: "wrong" }), "not_creator", 403);
  await rejects(deleteRoom(roomId, { server }), "unauthorized", 401);
  const over = [next(bob, "close"), next(eve, "close")];
  await deleteRoom(roomId, { server, token: ownerToken });
  for (const { error } of await Promise.all(over)) assert.equal(error.code, "room_deleted");
  await rejects(getRoom(roomId, { server }), "room_not_found", 404);
});

test("a member who was away too long is another", async (t) => {
  const { url: server, port } = await startParley(t, { ROOMS: "open", RESUME_TTL: "200ms" });
  const network = await startNetwork(t, port);
  const { code } = await openRoom({ server });
  const ada = joinRoom({ room: code, displayName: "Ada", server });
  const bob = joinRoom({ room: code, displayName: "Bob", server: network.url });
  t.after(() => (ada.close(), bob.close()));
  await until("both", () => ada.members.size === 1 && bob.members.size === 1);
  const before = bob.self.id;
  const left = next(ada, "leave");
  network.cut();
  assert.equal((await left).id, before);
  const back = next(bob, "open");
  network.mend();
  assert.deepEqual(await back, { resumed: false });
  assert.notEqual(bob.self.id, before);
  await until("Ada sees the new one", () => ada.members.has(bob.self.id) && ada.members.size === 1);
});
