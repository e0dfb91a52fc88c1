// The demo page as people use it: two devices, a code or a link, files either
// way; and everything that goes wrong in its own words.

import assert from "node:assert/strict";
import { test } from "node:test";

import {
  MiB, allow, card, clean, connected, diskSum, giveDisk, mintCode, mintLink, openDevice, pairByCode, pairByLink, save, says, sendRandom, startBrowser, stored,
  transfer, typeCode, verifiedByLink,
} from "./demo-support.mjs";
import { startNetwork, startParley, until } from "./support.mjs";

const browser = await startBrowser(test);

test("by code: the people compare, and files go both ways", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = await pairByCode(t, browser, url);
  await connected(a, b);
  const shown = await Promise.all([a, b].map((page) => page.locator("#emoji li").allInnerTexts()));
  assert.equal(shown[0].length, 5);
  assert.deepEqual(shown[0], shown[1]);
  for (const page of [a, b]) {
    await page.click("#match");
    await says(page, "#verified", /^Verified by comparing$/);
  }
  await transfer(a, b, "from a.bin", 3_000_000);
  await transfer(b, a, "from b.bin", 100);
  await transfer(a, b, "empty.bin", 0);
  clean(a, b);
});

test("by link: nobody compares, and 64 MiB go both ways", async (t) => {
  const { url } = await startParley(t);
  const a = await openDevice(t, browser, url);
  const link = await mintLink(a);
  const code = await a.textContent("#code");
  assert.match(link, new RegExp(`^${url}/#${code}\\.[A-Za-z0-9_-]{22}$`));
  const b = await openDevice(t, browser, link);
  await verifiedByLink(a, b);
  assert.equal(b.url(), url + "/", "the code and the key left the address bar");
  for (const page of [a, b]) assert.equal(await page.locator("#compare").isVisible(), false);
  await transfer(a, b, "large.bin", 64 * MiB);
  await transfer(b, a, "large too.bin", 64 * MiB);
  const [[one], [other]] = await Promise.all([sendRandom(a, { "one.bin": 8 * MiB }), sendRandom(b, { "other.bin": 8 * MiB })]);
  assert.deepEqual([await save(b, "one.bin"), await save(a, "other.bin")], [one, other], "both at once");
  clean(a, b);
});

test("codes that do not work, each in its own words", async (t) => {
  const { url } = await startParley(t, { REDEEM_FAILS: "3" });
  const [a, b, c] = [await openDevice(t, browser, url), await openDevice(t, browser, url), await openDevice(t, browser, url)];
  await typeCode(b, "12");
  await says(b, "#error", /^A code has 4 to 9 digits\.$/);
  await typeCode(b, "000000");
  await says(b, "#error", /^That code is wrong, already used or expired/);
  await b.goto(`${url}/#1234.tooshort`);
  await says(b, "#error", /^This link is not complete\./);

  const code = await mintCode(a);
  await typeCode(b, code);
  await connected(a, b);
  await typeCode(c, code);
  await says(c, "#error", /^That code is wrong, already used or expired/);
  await says(a, "#notice", /^Someone else tried your code\./);
  await connected(a, b); // all the same

  await typeCode(c, "111111"); // the third that fails
  await typeCode(c, "222222");
  await says(c, "#error", /^Too many wrong codes came from your network\. Try again in \d+ (s|min)/);
  clean(a, b, c);
});

test("a code that has expired is told on both devices", async (t) => {
  const { url } = await startParley(t, { ROOM_TTL: "2s" });
  const [a, b] = [await openDevice(t, browser, url), await openDevice(t, browser, url)];
  const code = await mintCode(a);
  await says(a, "#countdown", /^Valid for 0:0[12]$/);
  await says(a, "#countdown", /^This code has expired$/);
  assert.equal(await a.locator("#qr").isVisible(), false);
  await typeCode(b, code);
  await says(b, "#error", /^That code is wrong, already used or expired/);
  await a.click("#mint-again");
  await says(a, "#countdown", /^Valid/);
  await typeCode(b, await a.textContent("#code"));
  await connected(a, b);
  clean(a, b);
});

for (const appIDs of ["any", "minted"]) {
  test(`the server is killed in the middle of a transfer and comes back: it goes on (APP_IDS=${appIDs})`, async (t) => {
    const first = await startParley(t, { APP_IDS: appIDs });
    const [a, b] = await pairByLink(t, browser, first.url);
    await giveDisk(b, 8 * MiB);
    const [sum] = await sendRandom(a, { "film.mkv": 96 * MiB });
    await card(b, "in", "film.mkv").getByRole("button", { name: "Save" }).click();
    await stored(b, 8 * MiB);

    await first.stop("SIGKILL");
    for (const page of [a, b]) await says(page, "#status", /^Connected directly\. The server is away; transfers go on\.$/);
    await allow(b, 32 * MiB);
    await stored(b, 32 * MiB);

    await startParley(t, { APP_IDS: appIDs }, first.port);
    // A server that takes only sessions it has minted knows none any more.
    const back = appIDs === "any" ? /^Connected directly$/ : /^Connected directly\. The server has ended this session; transfers go on\.$/;
    for (const page of [a, b]) await says(page, "#status", back);
    await allow(b, Infinity);
    await card(b, "in", "film.mkv", "done").waitFor();
    await card(a, "out", "film.mkv", "done").waitFor();
    assert.equal(await diskSum(b), sum);
    clean(a, b);
  });
}

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
  await giveDisk(b, 8 * MiB);
  const [sum] = await sendRandom(a, { "film.mkv": 70 * MiB });
  await card(b, "in", "film.mkv").getByRole("button", { name: "Save" }).click();
  await stored(b, 8 * MiB);
  network.cut();
  await says(b, "#status", /^Connected directly\. The server is away; transfers go on\.$/);
  await allow(b, 16 * MiB);
  await stored(b, 16 * MiB);
  network.mend();
  await connected(a, b);
  await allow(b, Infinity);
  await card(b, "in", "film.mkv", "done").waitFor();
  assert.equal(await diskSum(b), sum);
  clean(a, b);
});

test("either side cancels on the way, and the next file goes", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = await pairByLink(t, browser, url);
  for (const [i, canceller] of [a, b].entries()) {
    await giveDisk(b, 4 * MiB);
    const [, sum] = await sendRandom(a, { [`long ${i}`]: 80 * MiB, [`next ${i}`]: 100_000 });
    await card(b, "in", `long ${i}`).getByRole("button", { name: "Save" }).click();
    await stored(b, 4 * MiB);
    await card(canceller, canceller === a ? "out" : "in", `long ${i}`).getByRole("button", { name: "Cancel" }).click();
    await allow(b, Infinity); // what was being written
    const other = canceller === a ? card(b, "in", `long ${i}`) : card(a, "out", `long ${i}`);
    await other.getByText("Cancelled by the other device").waitFor();
    await until("the disk gives up what it had", () => b.evaluate(() => disk.end === "aborted"));
    assert.equal(await save(b, `next ${i}`), sum);
  }
  clean(a, b);
});

test("large files are offered first: to disk, or declined", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = await pairByLink(t, browser, url);
  await giveDisk(b);
  const [sum] = await sendRandom(a, { "film.mkv": 70 * MiB });
  const offer = card(b, "in", "film.mkv", "offered");
  await offer.getByText("Where should it go?").waitFor();
  await card(a, "out", "film.mkv", "offered").getByText("Waiting").waitFor();
  await offer.getByRole("button", { name: "Save" }).click();
  await card(b, "in", "film.mkv", "done").getByText("Saved, checked").waitFor();
  assert.equal(await diskSum(b), sum);
  assert.equal(await b.evaluate(() => disk.name), "film.mkv");

  await sendRandom(a, { "film 2.mkv": 70 * MiB });
  await card(b, "in", "film 2.mkv").getByRole("button", { name: "Decline" }).click();
  await card(a, "out", "film 2.mkv", "cancelled").getByText("Declined by the other device").waitFor();
  clean(a, b);
});

test("a page that is reloaded keeps its code, and comes back to its session", async (t) => {
  const { url } = await startParley(t);
  const a = await openDevice(t, browser, url);
  const link = await mintLink(a);
  await a.reload();
  await a.locator("#screen-code").waitFor();
  assert.equal(await a.getAttribute("#link", "href"), link);
  const b = await openDevice(t, browser, link);
  await verifiedByLink(a, b);
  for (const page of [b, a]) {
    await page.reload();
    await connected(a, b);
    await verifiedByLink(a, b);
    await transfer(a, b, `after a reload of ${page === a ? "a" : "b"}`, 100_000);
  }
  clean(a, b);
});

test("whoever comes with another key than the link's is turned away by both", async (t) => {
  const { url } = await startParley(t);
  const a = await openDevice(t, browser, url);
  const link = await mintLink(a);
  const b = await openDevice(t, browser, link.replace(/\..{22}$/, "." + "A".repeat(22)));
  for (const page of [a, b]) {
    await says(page, "#warning-title", /^Stop: this may not be the device you meant$/);
    assert.equal(await page.locator("#screen-room").isVisible(), false);
  }
  clean(a, b);
});
