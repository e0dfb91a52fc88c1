// A server that turns on its users: it gives the one who redeems a code another
// session than the one who minted it, and sits in both, with certificates of
// its own. What the demo page verifies must show that.

import assert from "node:assert/strict";
import { test } from "node:test";

import { card, clean, connected, mintCode, mintLink, openDevice, says, typeCode } from "./demo-support.mjs";
import { startBrowser, startParley } from "./support.mjs";

const browser = await startBrowser(test);

// victims opens two pages whose server is malicious: what b redeems leads to the
// attacker, who is in a page of its own. How it talks to them is the test's.
async function victims(t) {
  const { url } = await startParley(t);
  const [a, b, attacker] = await Promise.all([url, url, url + "/version"].map((at) => openDevice(t, browser, at)));
  const other = await attacker.evaluate(async () => {
    globalThis.parley = await import("/web/parley.js");
    globalThis.verifier = await import("/web/verify.js");
    return parley.mint();
  });
  await b.route("**/rendezvous/redeem", (route) => route.fulfill({ json: other }));
  const attack = async () => {
    const { appID } = JSON.parse(await a.evaluate(() => sessionStorage.getItem("parley-demo")));
    await attacker.evaluate(([x, y]) => {
      const options = (appID, side) => ({ server: location.origin, appID, side });
      globalThis.toA = parley.connect(options(x, "B"));
      globalThis.toB = parley.connect(options(y, "A"));
    }, [appID, other.appID]);
  };
  return { a, b, attacker, attack };
}

// bridge passes on, in the attacker's page, what either says on a channel.
const bridge = (attacker, ...labels) =>
  attacker.evaluate((labels) => {
    globalThis.passed = {};
    for (const label of labels) {
      const ends = [toA, toB].map((session) => session.channel(label));
      ends.forEach(async (end, i) => {
        (await end).addEventListener("message", async ({ data }) => {
          passed[label] = (passed[label] ?? 0) + 1;
          (await ends[1 - i]).send(data);
        });
      });
    }
  }, labels);

// pretend talks to both as if the attacker were the other; it knows no key, but
// may say that it does.
const pretend = (attacker, claimsKey) =>
  attacker.evaluate((claimsKey) => {
    const key = claimsKey ? new Uint8Array(16) : null;
    for (const [session, role] of [[toA, "B"], [toB, "A"]]) {
      session.channel("files");
      session
        .channel("verify")
        .then((channel) => verifier.verify({ pc: session.peerConnection(), channel, role, key }))
        .catch(() => {});
    }
  }, claimsKey);

const emoji = async (page) => {
  await page.locator("#emoji li").nth(4).waitFor();
  return page.locator("#emoji li").allInnerTexts();
};

const warned = (page) => says(page, "#warning-title", /^Stop: this may not be the device you meant$/);

for (const [how, talk] of [
  ["passes on what they say", (attacker) => bridge(attacker, "verify", "files")],
  ["verifies with both itself", (attacker) => pretend(attacker, false)],
]) {
  test(`by code, a man in the middle who ${how}: the pictures differ`, async (t) => {
    const { a, b, attacker, attack } = await victims(t);
    const code = await mintCode(a);
    await attack();
    await talk(attacker);
    await typeCode(b, code);
    await connected(a, b); // as far as they can tell
    const [shownA, shownB] = [await emoji(a), await emoji(b)];
    assert.notDeepEqual(shownA, shownB);
    for (const page of [a, b]) {
      await page.click("#differ");
      await says(page, "#warning-title", /^Stop: the devices do not see each other$/);
    }
    clean(a, b);
  });
}

test("by link, a man in the middle who passes on what they say: both stop, and no file gets through", async (t) => {
  const { a, b, attacker, attack } = await victims(t);
  const link = await mintLink(a);
  await attack();
  await bridge(attacker, "verify", "files");
  // A file is picked as early as can be: the page must keep it back.
  const picks = [a, b].map((page) =>
    page.evaluate(() => {
      const files = document.querySelector("#files");
      new MutationObserver(() => {
        if (files.disabled) return;
        const picked = new DataTransfer();
        picked.items.add(new File(["secret"], "secret.txt"));
        files.files = picked.files;
        files.dispatchEvent(new Event("change"));
      }).observe(files, { attributes: true });
    }),
  );
  await Promise.all(picks);
  await b.evaluate((hash) => void (location.hash = hash), new URL(link).hash);
  for (const page of [a, b]) {
    await warned(page);
    assert.equal(await card(page, "out", "secret.txt").count(), 0);
    assert.equal(await card(page, "in", "secret.txt").count(), 0);
  }
  const passed = await attacker.evaluate(() => passed);
  assert.ok(passed.verify >= 4, "it was the bridge that was noticed");
  assert.equal(passed.files, undefined);
  clean(a, b);
});

for (const claimsKey of [true, false]) {
  test(`by link, a man in the middle who says that it ${claimsKey ? "knows the key" : "has no key"}`, async (t) => {
    const { a, b, attacker, attack } = await victims(t);
    const link = await mintLink(a);
    await attack();
    await pretend(attacker, claimsKey);
    await b.evaluate((hash) => void (location.hash = hash), new URL(link).hash);
    await warned(b); // whose key came with the link
    if (claimsKey) {
      await warned(a);
    } else {
      // For all it knows someone has typed its code; nothing is verified.
      await emoji(a);
      assert.equal(await a.locator("#verified").isVisible(), false);
    }
    clean(a, b);
  });
}
