// What the tests of web/parley.js share: a parley of their own, a network that
// can be cut, and events that can be waited for.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import net from "node:net";

/** Starts a parley on a free port, or on the one given, until the test ends. */
export async function startParley(t, env = {}, port = 0) {
  const binary = process.env.PARLEY_BIN;
  assert.ok(binary, "PARLEY_BIN must name a parley binary");
  const child = spawn(binary, { env: { PATH: process.env.PATH, GORACE: "atexit_sleep_ms=0", HOST: "127.0.0.1", PORT: String(port), ...env } });
  let out = "";
  const listening = new Promise((resolve, reject) => {
    const look = (chunk) => {
      out += chunk;
      const found = /(?:listens on |"address":")(http:[^\s"]+)[\s"]/.exec(out);
      if (found) resolve(found[1]);
    };
    child.stdout.on("data", look);
    child.stderr.on("data", look);
    child.on("exit", (code) => reject(new Error(`parley ended with ${code}:\n${out}`)));
  });
  const exited = once(child, "exit");
  const stop = async (signal = "SIGTERM") => {
    child.kill(signal);
    await exited;
  };
  t.after(async () => {
    await stop();
    assert.ok(!out.includes("DATA RACE"), out);
  });
  const url = await listening;
  return { url, port: Number(new URL(url).port), stop };
}

// PATIENCE is how long to wait for what must happen, in ms: long enough for a
// machine that has much else to do.
export const PATIENCE = 60_000;

/** A browser for all tests of a file. */
export async function startBrowser(test) {
  const { chromium } = await import("playwright-core");
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
    // Without multicast DNS the pages see each other's loopback addresses; a
    // TURN server there is used only when asked for.
    args: ["--no-sandbox", "--disable-features=WebRtcHideLocalIpsWithMdns", "--allow-loopback-in-peer-connection"],
  });
  test.after(() => browser.close());
  return browser;
}

/** A network between clients and a server, which can be cut. */
export async function startNetwork(t, target) {
  const pairs = new Set();
  let isCut = false;
  const server = net.createServer((client) => {
    if (isCut) return void client.destroy();
    const upstream = net.connect(target, "127.0.0.1");
    const pair = [client, upstream];
    pairs.add(pair);
    for (const [from, to] of [pair, pair.toReversed?.() ?? [upstream, client]]) {
      from.on("error", () => {});
      from.on("data", (chunk) => isCut || to.write(chunk));
      from.on("close", () => {
        pairs.delete(pair);
        to.destroy();
      });
    }
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const kill = () => {
    for (const pair of pairs) for (const socket of pair) socket.resetAndDestroy();
  };
  t.after(() => {
    kill();
    server.close();
  });
  return {
    url: `http://127.0.0.1:${server.address().port}`,
    /** Ends every connection at once, as a lost network would in the end. */
    kill,
    /** From now on nothing gets through, also not new connections. */
    cut() {
      isCut = true;
      kill();
    },
    mend() {
      isCut = false;
    },
  };
}

/** Resolves with the detail of the next event of a type that suits; fails after ms. */
export function next(target, type, suits = () => true, ms = PATIENCE) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`no ${type} within ${ms} ms`)), ms);
    target.addEventListener(type, function listen({ detail }) {
      if (!suits(detail)) return;
      target.removeEventListener(type, listen);
      clearTimeout(timer);
      resolve(detail);
    });
  });
}

/** Waits until condition holds; fails after ms. */
export async function until(what, condition, ms = PATIENCE) {
  for (const end = Date.now() + ms; !(await condition()); await new Promise((resolve) => setTimeout(resolve, 20))) {
    if (Date.now() > end) throw new Error(`not within ${ms} ms: ${what}`);
  }
}
