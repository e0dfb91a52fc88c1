// The demo page when something fails: the server dies, a network is cut, a relay
// stalls, a channel closes. A transfer goes on wherever it can.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { MiB, allow, card, clean, connected, diskSum, goesOn, mintCode, mintLink, onItsWay, openDevice, pairByLink, save, says, sendRandom, transfer, typeCode, verifiedByLink } from "./demo-support.mjs";
import { startBrowser, startNetwork, startParley, until } from "./support.mjs";

const browser = await startBrowser(test);

test("the server is killed in the middle of a transfer and comes back: it goes on to its end", async (t) => {
  const first = await startParley(t);
  const [a, b] = await pairByLink(t, browser, first.url);
  const sum = await onItsWay(a, b);
  await first.stop("SIGKILL");
  for (const page of [a, b]) await says(page, "#status", /^Connected directly\. The server is away; transfers go on\.$/);
  await goesOn(b);
  await startParley(t, {}, first.port);
  await connected(a, b);
  await goesOn(b);

  const heights = () => Promise.all([card(a, "out", "film.mkv"), card(b, "in", "film.mkv")].map(async (it) => (await it.boundingBox()).height));
  const before = await heights();
  await allow(b, Infinity);
  await card(b, "in", "film.mkv", "done").getByText("Saved, checked").waitFor();
  await card(a, "out", "film.mkv", "done").waitFor();
  assert.equal(await diskSum(b), sum);
  assert.equal(await b.evaluate(() => disk.name), "film.mkv");
  assert.deepEqual(await heights(), before, "the page does not jump");
  clean(a, b);
});

test("a server that knows the session no more after its restart leaves the transfer alone", async (t) => {
  const first = await startParley(t, { APP_IDS: "minted" });
  const [a, b] = await pairByLink(t, browser, first.url);
  await onItsWay(a, b);
  await first.stop("SIGKILL");
  await startParley(t, { APP_IDS: "minted" }, first.port);
  for (const page of [a, b]) await says(page, "#status", /^Connected directly\. The server has ended this session; transfers go on\.$/);
  await goesOn(b);
  clean(a, b);
});

test("a network that is cut is shown, and heals", async (t) => {
  const { url, port } = await startParley(t);
  const network = await startNetwork(t, port);
  const b = await openDevice(t, browser, network.url);
  const code = await mintCode(b);
  network.cut();
  await says(b, "#status", /^This device is offline, retrying$/);
  await says(b, "#status-count", /^in \d+ s$/);
  network.mend();
  await says(b, "#status", /^Waiting for the other device$/);

  const a = await openDevice(t, browser, url);
  await typeCode(a, code);
  await connected(a, b);
  for (const page of [a, b]) await page.click("#match");
  await onItsWay(a, b);
  network.cut();
  await says(b, "#status", /^Connected directly\. The server is away; transfers go on\.$/);
  await goesOn(b);
  network.mend();
  await connected(a, b);
  await goesOn(b);
  clean(a, b);
});

// startTURN runs coturn on loopback until the test ends.
async function startTURN(t, secret) {
  const socket = createSocket("udp4").bind(0, "127.0.0.1");
  await once(socket, "listening");
  const { port } = socket.address();
  const dir = mkdtempSync(join(tmpdir(), "parley-turn-"));
  socket.close();
  const child = spawn("turnserver", [
    "-n", "--listening-ip=127.0.0.1", "--relay-ip=127.0.0.1", "--allow-loopback-peers", `--listening-port=${port}`, "--use-auth-secret",
    `--static-auth-secret=${secret}`, "--realm=parley.test", "--no-tls", "--no-dtls", "--no-cli", "--no-rfc5780", "--relay-threads=1",
    "--log-file=stdout", "--simple-log", `--userdb=${dir}/turndb`, `--pidfile=${dir}/pid`,
  ], { cwd: dir, stdio: "ignore" });
  const exited = once(child, "exit");
  t.after(async () => {
    child.kill("SIGKILL");
    await exited;
    rmSync(dir, { recursive: true });
  });
  // It listens on TCP as well, when it is ready.
  await until("coturn is ready", () => new Promise((resolve) => {
    const probe = connect(port, "127.0.0.1", () => (probe.destroy(), resolve(true)));
    probe.on("error", () => resolve(false));
  }));
  return {
    url: `turn:127.0.0.1:${port}?transport=udp`,
    cut: () => child.kill("SIGSTOP"),
    mend: () => child.kill("SIGCONT"),
  };
}

// relayOnly makes of a page a device that reaches nothing but the relay, and whose
// first statistics are from before it was connected.
function relayOnly() {
  const { getStats } = RTCPeerConnection.prototype;
  RTCPeerConnection.prototype.getStats = async function () {
    RTCPeerConnection.prototype.getStats = getStats;
    return new Map();
  };
  globalThis.RTCPeerConnection = class extends RTCPeerConnection {
    constructor(configuration) {
      super({ ...configuration, iceTransportPolicy: "relay" });
    }
    setConfiguration(configuration) {
      super.setConfiguration({ ...configuration, iceTransportPolicy: "relay" });
    }
  };
}

test("a relay is shown as one; when the path between the devices is cut that is shown, and heals", async (t) => {
  const secret = "shared with coturn";
  const relay = await startTURN(t, secret);
  const { url } = await startParley(t, { TURN_URLS: relay.url, TURN_SECRET: secret });
  const a = await openDevice(t, browser, url, { init: relayOnly });
  const b = await openDevice(t, browser, await mintLink(a));
  for (const page of [a, b]) await says(page, "#status", /^Connected through a relay$/);
  await verifiedByLink(a, b);
  await transfer(a, b, "before.bin", MiB);
  relay.cut();
  for (const page of [a, b]) await says(page, "#status", /^The connection was interrupted, reconnecting$/);
  const [sum] = await sendRandom(a, { "meanwhile.bin": MiB });
  relay.mend();
  for (const page of [a, b]) await says(page, "#status", /^Connected through a relay$/);
  assert.equal(await save(b, "meanwhile.bin"), sum);
  clean(a, b);
});

test("the server's own relay connects two who reach nothing else", async (t) => {
  const { url } = await startParley(t, { TURN: "on", TURN_PORT: "0" });
  const a = await openDevice(t, browser, url, { init: relayOnly });
  const b = await openDevice(t, browser, await mintLink(a), { init: relayOnly });
  for (const page of [a, b]) await says(page, "#status", /^Connected through a relay$/);
  await verifiedByLink(a, b);
  await transfer(a, b, "to b.bin", 3 * MiB);
  await transfer(b, a, "to a.bin", 3 * MiB);
  clean(a, b);
});

test("a channel that is closed is opened anew, and nobody needs to verify again", async (t) => {
  const { url } = await startParley(t);
  const init = () => {
    const { createDataChannel } = RTCPeerConnection.prototype;
    RTCPeerConnection.prototype.createDataChannel = function (label, options) {
      return (globalThis[label] = createDataChannel.call(this, label, options));
    };
  };
  const [a, b] = await pairByLink(t, browser, url, { init });
  await transfer(a, b, "before", 100_000);
  await onItsWay(a, b);
  await a.evaluate(() => files.close());
  await card(a, "out", "film.mkv", "failed").getByText("The connection to the other device was lost.").waitFor();
  await card(b, "in", "film.mkv", "failed").getByText("The connection to the other device was lost.").waitFor();
  await verifiedByLink(a, b);
  await connected(a, b);
  await until("files can be sent", async () => (await a.isEnabled("#files")) && (await b.isEnabled("#files")));
  await transfer(a, b, "after", 100_000);
  await transfer(b, a, "after, too", 100_000);
  clean(a, b);
});
