// web/parley.js in a real browser: two pages make WebRTC connections through a
// server and a network that fail in every way.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { test } from "node:test";

import { startBrowser, startNetwork, startParley, until } from "./support.mjs";

const browser = await startBrowser(test);

// page opens a page of its own, with the client loaded; server is where the page
// says that it is.
async function openPage(t, server) {
  const context = await browser.newContext();
  t.after(() => context.close());
  const page = await context.newPage();
  page.errors = [];
  page.on("pageerror", (error) => page.errors.push(String(error)));
  page.on("console", (m) => m.type() === "warning" && m.text().includes("parley:") && page.errors.push(m.text()));
  await loadPage(page, server);
  return page;
}

async function loadPage(page, server) {
  await page.goto(server + "/version");
  await page.evaluate(async () => {
    globalThis.parley = await import("/web/parley.js");
    // echo talks over a channel until both have heard each other.
    globalThis.greet = async (session, label, peer) => {
      const channel = await (peer ? session.channel(peer, label) : session.channel(label));
      const heard = new Promise((resolve) => channel.addEventListener("message", ({ data }) => resolve(data), { once: true }));
      channel.send("hello from " + (session.side ?? session.self.id));
      return heard;
    };
  });
}

const join = (page, options) =>
  page.evaluate((options) => {
    globalThis.session = parley.connect({ server: location.origin, ...options });
  }, options);

const greet = (page, label = "greetings") => page.evaluate((label) => greet(session, label), label);

// meet has two pages greet each other.
async function meet(a, b, label) {
  assert.deepEqual(await Promise.all([greet(a, label), greet(b, label)]), ["hello from B", "hello from A"]);
}

const clean = (...pages) => pages.forEach((page) => assert.deepEqual(page.errors, []));

test("a channel opens, and the route is known", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = [await openPage(t, url), await openPage(t, url)];
  const { code, appID } = await a.evaluate(() => parley.mint());
  await join(a, { appID, side: "A" });
  const redeemed = await b.evaluate((code) => parley.redeem(code), code);
  await join(b, { appID: redeemed.appID, side: "B" });
  await meet(a, b);
  for (const page of [a, b]) await until("a route", () => page.evaluate(() => ["host", "prflx", "srflx"].includes(session.route)));
  await until("the server's count", async () => (await (await fetch(url + "/metrics")).text()).match(/parley_sessions_established_total\{mode="(host|prflx|srflx)"\} 1/));
  clean(a, b);
});

test("glare: both negotiate at once, 50 times", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = [await openPage(t, url), await openPage(t, url)];
  const appID = randomUUID();
  await Promise.all([join(a, { appID, side: "A" }), join(b, { appID, side: "B" })]);
  await meet(a, b);
  for (let round = 0; round < 50; round++) {
    // Another media line makes another offer necessary, on both sides in the same moment.
    const more = (page) => page.evaluate(() => void session.peerConnection().addTransceiver("audio", { direction: "recvonly" }));
    await Promise.all([more(a), more(b)]);
    const stable = (page) =>
      page.evaluate(() => {
        const pc = session.peerConnection();
        return pc.signalingState === "stable" && pc.connectionState === "connected" && pc.getTransceivers().every((x) => x.mid !== null);
      });
    await until(`round ${round} settled`, async () => (await stable(a)) && (await stable(b)));
  }
  await meet(a, b, "after it all");
  clean(a, b);
});

test("a session that begins with glare, 10 times", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = [await openPage(t, url), await openPage(t, url)];
  for (let round = 0; round < 10; round++) {
    const appID = randomUUID();
    await Promise.all([join(a, { appID, side: "A" }), join(b, { appID, side: "B" })]);
    await meet(a, b);
    for (const page of [a, b]) await page.evaluate(() => session.close());
  }
  clean(a, b);
});

test("the server is killed and comes back: the channel goes on", async (t) => {
  const first = await startParley(t);
  const [a, b] = [await openPage(t, first.url), await openPage(t, first.url)];
  const appID = randomUUID();
  await Promise.all([join(a, { appID, side: "A" }), join(b, { appID, side: "B" })]);
  await meet(a, b);
  for (const page of [a, b]) {
    await page.evaluate(async () => {
      globalThis.heard = 0;
      const channel = await session.channel("greetings");
      channel.addEventListener("message", () => heard++);
      globalThis.talk = setInterval(() => channel.send("."), 20);
    });
  }
  const goesOn = (page) => until("it goes on", async () => (await page.evaluate(() => ((globalThis.was ??= heard), heard > was + 20))));
  await first.stop("SIGKILL");
  for (const page of [a, b]) await until("offline", () => page.evaluate(() => session.state === "offline"));
  await Promise.all([goesOn(a), goesOn(b)]);
  await startParley(t, {}, first.port);
  for (const page of [a, b]) await until("open again", () => page.evaluate(() => session.state === "open"));
  for (const page of [a, b]) await page.evaluate(() => delete globalThis.was);
  await Promise.all([goesOn(a), goesOn(b)]);
  clean(a, b);
});

test("the network is cut before the channel opens: it opens all the same", async (t) => {
  const { url, port } = await startParley(t);
  const network = await startNetwork(t, port);
  const [a, b] = [await openPage(t, url), await openPage(t, network.url)];
  const appID = randomUUID();
  await Promise.all([join(a, { appID, side: "A" }), join(b, { appID, side: "B" })]);
  await until("both there", () => a.evaluate(() => session.presence === "present"));
  network.cut();
  const greeting = Promise.all([greet(a), greet(b)]);
  await new Promise((resolve) => setTimeout(resolve, 10_000)); // the length of the cut
  network.mend();
  assert.deepEqual(await greeting, ["hello from B", "hello from A"]);
  clean(a, b);
});

test("through a TURN server, and known as such", async (t) => {
  const { TURN_ADDR, TURN_SECRET } = process.env;
  assert.ok(TURN_ADDR && TURN_SECRET, "TURN_ADDR and TURN_SECRET must name a TURN server, as TestBrowser does");
  const { url } = await startParley(t, { TURN_URLS: `turn:${TURN_ADDR}`, TURN_SECRET });
  const [a, b] = [await openPage(t, url), await openPage(t, url)];
  const appID = randomUUID();
  const rtc = { iceTransportPolicy: "relay" };
  await Promise.all([join(a, { appID, side: "A", rtc }), join(b, { appID, side: "B", rtc })]);
  await meet(a, b);
  for (const page of [a, b]) await until("the route", () => page.evaluate(() => session.route === "relay"));
  await until("the server's count", async () => (await (await fetch(url + "/metrics")).text()).includes('parley_sessions_established_total{mode="relay"} 1'));
  clean(a, b);
});

test("TURN credentials are replaced before they expire, also in the connection", async (t) => {
  const { url } = await startParley(t, { TURN_URLS: "turn:turn.example", TURN_SECRET: "secret", TURN_TTL: "4s" });
  const a = await openPage(t, url);
  await join(a, { appID: randomUUID(), side: "A" });
  await until("credentials", () => a.evaluate(() => session.iceServers.length === 1));
  const seen = await a.evaluate(async () => {
    const expiry = () => session.peerConnection().getConfiguration().iceServers[0].username.split(":")[0] * 1000;
    const seen = [];
    for (let last = 0; seen.length < 3; await new Promise((resolve) => setTimeout(resolve, 20))) {
      if (expiry() !== last) seen.push([(last = expiry()), Date.now()]);
      if (expiry() < Date.now()) return "expired";
    }
    return seen;
  });
  assert.equal(seen.length, 3, String(seen));
  clean(a);
});

test("a page that is loaded again is met again", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = [await openPage(t, url), await openPage(t, url)];
  const appID = randomUUID();
  await Promise.all([join(a, { appID, side: "A", sid: "a" }), join(b, { appID, side: "B", sid: "b" })]);
  await meet(a, b);
  for (const [reloaded, other, side] of [[b, a, "B"], [a, b, "A"], [b, a, "B"]]) {
    const replaced = other.evaluate(
      () => new Promise((resolve) => session.addEventListener("peerconnection", () => resolve(greet(session, "greetings")), { once: true })),
    );
    await loadPage(reloaded, url);
    await join(reloaded, { appID, side, sid: side.toLowerCase() });
    assert.equal(await greet(reloaded), `hello from ${side === "A" ? "B" : "A"}`);
    assert.equal(await replaced, `hello from ${side}`);
  }
  clean(a, b);
});

// An older client of the pair protocol: no subprotocol, no mail, no perfect
// negotiation. A makes the offer and the channel, B answers.
const joinOlder = (page, options) =>
  page.evaluate(({ appID, side }) => {
    const ws = new WebSocket(`${location.origin.replace("http", "ws")}/ws?appID=${appID}&side=${side}`);
    const pc = (globalThis.olderPC = new RTCPeerConnection());
    const say = (frame) => ws.send(JSON.stringify(frame));
    const describe = async () => {
      await pc.setLocalDescription();
      say({ type: pc.localDescription.type, sdp: pc.localDescription.sdp });
    };
    pc.onicecandidate = ({ candidate }) => candidate && say({ type: "ice", candidate });
    const talk = (channel) => {
      const hello = () => channel.send("hello from an older " + side);
      if (channel.readyState === "open") hello(); // a busy browser tells of a channel after it has opened
      else channel.onopen = hello;
      channel.onmessage = ({ data }) => (globalThis.heard = data);
    };
    if (side === "B") pc.ondatachannel = ({ channel }) => talk(channel);
    else talk(pc.createDataChannel("chat"));
    ws.onopen = () => side === "A" && describe();
    let turn = Promise.resolve();
    ws.onmessage = ({ data }) => {
      turn = turn.then(async () => {
        const { type, sdp, candidate } = JSON.parse(data);
        if (type === "ice") return pc.addIceCandidate(candidate);
        if (type !== "offer" && type !== "answer") return;
        await pc.setRemoteDescription({ type, sdp });
        if (type === "offer") await describe();
      });
    };
  }, options);

// stateOf says how far two have come who do not meet.
const stateOf = (page) =>
  page.evaluate(() => {
    const pc = globalThis.olderPC ?? session.peerConnection();
    const { heard, session: { state, presence } = {} } = globalThis;
    const candidates = (description) => description?.sdp.split("a=candidate:").length - 1;
    return JSON.stringify({
      heard, state, presence, signaling: pc.signalingState, gathering: pc.iceGatheringState, ice: pc.iceConnectionState, connection: pc.connectionState,
      local: candidates(pc.localDescription), remote: candidates(pc.remoteDescription),
    });
  });

for (const [ours, theirs] of [["A", "B"], ["B", "A"]]) {
  test(`with an older client as ${theirs}`, async (t) => {
    const { url } = await startParley(t);
    const [a, b] = [await openPage(t, url), await openPage(t, url)];
    const appID = randomUUID();
    await join(a, { appID, side: ours });
    await a.evaluate((side) => {
      const pc = session.peerConnection();
      const talk = (channel) => {
        channel.onmessage = ({ data }) => (globalThis.heard = data);
        const hello = () => channel.send("hello from " + side);
        if (channel.readyState === "open") hello();
        else channel.onopen = hello;
      };
      if (side === "A") talk(pc.createDataChannel("chat"));
      else pc.ondatachannel = ({ channel }) => talk(channel);
    }, ours);
    await joinOlder(b, { appID, side: theirs });
    for (const page of [a, b]) {
      await until("a word of the other", () => page.evaluate(() => globalThis.heard !== undefined)).catch(async (error) =>
        assert.fail([error, ...a.errors, ...b.errors, await stateOf(a), await stateOf(b)].join("\n")),
      );
    }
    assert.deepEqual(await Promise.all([a, b].map((page) => page.evaluate(() => heard))), ["hello from an older " + theirs, "hello from " + ours]);
    await until("a route", () => a.evaluate(() => session.route !== null));
    clean(a, b);
  });
}

// A session whose frames can be read, and some of them lost.
const tap = (page) =>
  page.evaluate(() => {
    globalThis.sent = [];
    globalThis.lose = () => false;
    const send = WebSocket.prototype.send;
    WebSocket.prototype.send = function (text) {
      const frame = JSON.parse(text);
      sent.push(frame);
      if (!lose(frame)) send.call(this, text);
    };
  });

test("another certificate is another connection, and a provisional answer is none", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = [await openPage(t, url), await openPage(t, url)];
  await tap(b);
  const appID = randomUUID();
  await Promise.all([join(a, { appID, side: "A" }), join(b, { appID, side: "B" })]);
  await meet(a, b);
  await a.evaluate(() => {
    globalThis.first = session.peerConnection();
    globalThis.fresh = new Promise((resolve) => session.addEventListener("peerconnection", () => resolve(first.connectionState), { once: true }));
  });
  // forge has B's server say that B has described itself with another certificate.
  const forge = (type) =>
    b.evaluate((type) => {
      const { payload } = sent.findLast(({ payload }) => payload?.description);
      const sdp = payload.description.sdp.replace(/(a=fingerprint:sha-256 )[0-9A-F:]+/g, "$1" + Array(32).fill("AB").join(":"));
      return session.send({ ...payload, offer: undefined, description: { type, sdp } });
    }, type);
  await forge("pranswer");
  await forge("answer");
  await a.evaluate(() => new Promise((resolve) => setTimeout(resolve, 300)));
  assert.deepEqual(await a.evaluate(() => [first === session.peerConnection(), first.signalingState, first.remoteDescription.sdp.includes("AB:AB:AB")]), [true, "stable", false]);
  await forge("offer");
  assert.equal(await a.evaluate(() => fresh), "closed");
});

test("an answer that is lost in a room is asked for again", async (t) => {
  const { url, port } = await startParley(t, { ROOMS: "open" });
  const network = await startNetwork(t, port);
  const pages = [await openPage(t, network.url), await openPage(t, network.url)];
  const { code } = await pages[0].evaluate(() => parley.openRoom());
  for (const page of pages) {
    await tap(page);
    await page.evaluate((code) => {
      globalThis.lost = 0;
      globalThis.lose = ({ type }) => type === "answer" && lost++ === 0;
      globalThis.session = parley.joinRoom({ server: location.origin, room: code });
    }, code);
  }
  for (const page of pages) await until("both there", () => page.evaluate(() => session.members.size === 1));
  const greeting = Promise.all(pages.map((page) => page.evaluate(() => greet(session, "game", [...session.members.keys()][0]))));
  await until("an answer is lost", async () => (await Promise.all(pages.map((page) => page.evaluate(() => lost)))).some((n) => n > 0));
  network.kill();
  for (const heard of await greeting) assert.match(heard, /^hello from /);
});

test("a channel that can never open is refused, with the reason", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = [await openPage(t, url), await openPage(t, url)];
  const appID = randomUUID();
  await join(a, { appID, side: "A" });
  await until("A there", () => a.evaluate(() => session.state === "open"));
  await join(b, { appID, side: "A" });
  const codes = await b.evaluate(async () => {
    const early = await session.channel("chat").catch((error) => error.code);
    return [early, await session.channel("later").catch((error) => error.code)];
  });
  assert.deepEqual(codes, ["busy", "busy"]);
  clean(a, b);
});

test("a channel that was closed is opened anew", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = [await openPage(t, url), await openPage(t, url)];
  const appID = randomUUID();
  await Promise.all([join(a, { appID, side: "A" }), join(b, { appID, side: "B" })]);
  await meet(a, b);
  for (const closer of [a, b]) {
    const closed = [a, b].map((page) =>
      page.evaluate(async () => {
        const channel = await session.channel("greetings");
        globalThis.closing = new Promise((resolve) => channel.addEventListener("close", resolve));
      }),
    );
    await Promise.all(closed);
    await closer.evaluate(async () => (await session.channel("greetings")).close());
    for (const page of [a, b]) await page.evaluate(() => closing.then(() => {}));
    await meet(a, b);
  }
  clean(a, b);
});

test("a channel on a connection that is closed is refused", async (t) => {
  const { url } = await startParley(t);
  const a = await openPage(t, url);
  await join(a, { appID: randomUUID(), side: "A" });
  const code = await a.evaluate(async () => {
    const opening = session.channel("never");
    session.close();
    return opening.then(() => "opened", (error) => error.code);
  });
  assert.equal(code, "closed");
  const codes = await a.evaluate(async () => {
    const later = await session.channel("later").catch((error) => error.code);
    try {
      return [later, session.peerConnection()];
    } catch (error) {
      return [later, error.code];
    }
  });
  assert.deepEqual(codes, ["closed", "closed"]);
  clean(a);
});

test("a room of four makes a full mesh", async (t) => {
  const { url } = await startParley(t, { ROOMS: "open" });
  const pages = await Promise.all([0, 1, 2, 3].map(() => openPage(t, url)));
  const { code } = await pages[0].evaluate(() => parley.openRoom());
  for (const [i, page] of pages.entries()) {
    await page.evaluate(({ code, i }) => void (globalThis.session = parley.joinRoom({ server: location.origin, room: code, displayName: `player ${i}` })), { code, i });
  }
  for (const page of pages) await until("all there", () => page.evaluate(() => session.members.size === 3));
  const heard = await Promise.all(
    pages.map((page) => page.evaluate(() => Promise.all([...session.members.keys()].map(async (id) => (await greet(session, "game", id)) === "hello from " + id)))),
  );
  assert.deepEqual(heard, Array(4).fill([true, true, true]));
  clean(...pages);
});
