// The demo page as people use it: two devices, a code or a link, files either
// way; and everything that goes wrong in its own words. outage.test.mjs has what
// breaks under way.

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { test } from "node:test";

import { MiB, allow, card, clean, connected, giveDisk, mintCode, mintLink, openDevice, pairByCode, pairByLink, save, says, sendRandom, stored, transfer, typeCode, verifiedByLink } from "./demo-support.mjs";
import { startBrowser, startParley, until } from "./support.mjs";

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
  const [[one], [other]] = await Promise.all([sendRandom(a, { "one.bin": 2 * MiB }), sendRandom(b, { "other.bin": 2 * MiB })]);
  assert.deepEqual([await save(b, "one.bin"), await save(a, "other.bin")], [one, other], "both at once");
  clean(a, b);
});

test("files that are dropped or pasted are sent, too", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = await pairByLink(t, browser, url);
  const give = (type, name) =>
    a.evaluate(([type, name]) => {
      const data = new DataTransfer();
      data.items.add(new File(["content of " + name], name));
      const options = { bubbles: true, cancelable: true };
      const event = type === "paste" ? new ClipboardEvent(type, { ...options, clipboardData: data }) : new DragEvent(type, { ...options, dataTransfer: data });
      document.body.dispatchEvent(event);
      return event.defaultPrevented;
    }, [type, name]);
  await give("dragenter", "dropped.txt");
  await a.locator("#overlay").waitFor();
  assert.ok(await give("dragover", "dropped.txt"), "the page takes it");
  assert.ok(await give("drop", "dropped.txt"), "the browser does not open it");
  await a.locator("#overlay").waitFor({ state: "hidden" });
  await give("paste", "pasted.txt");
  for (const name of ["dropped.txt", "pasted.txt"]) assert.equal(await save(b, name), createHash("sha256").update("content of " + name).digest("hex"));
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
  await says(c, "#error", /^That code is wrong, already used or expired/); // meanwhile the page takes no other
  await typeCode(c, "222222");
  await says(c, "#error", /^Too many wrong codes came from your network\. Try again in \d+ (s|min)/);
  clean(a, b, c);
});

test("a code that has expired is told on both devices", async (t) => {
  const { url } = await startParley(t, { ROOM_TTL: "6s" });
  const [a, b] = [await openDevice(t, browser, url), await openDevice(t, browser, url)];
  const code = await mintCode(a);
  await says(a, "#countdown", /^Valid for 0:0[1-6]$/);
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

test("either side cancels on the way, and the next file goes; only meanwhile the screen stays on", async (t) => {
  const { url } = await startParley(t);
  const init = () => {
    const { request } = WakeLock.prototype;
    WakeLock.prototype.request = async function (type) {
      return (globalThis.wakeLock = await request.call(this, type));
    };
  };
  const [a, b] = await pairByLink(t, browser, url, { init });
  for (const [i, canceller] of [a, b].entries()) {
    await giveDisk(b, 4 * MiB);
    const [, sum] = await sendRandom(a, { [`long ${i}`]: 80 * MiB, [`next ${i}`]: 100_000 });
    await card(b, "in", `long ${i}`).getByRole("button", { name: "Save" }).click();
    await stored(b, 4 * MiB);
    for (const page of [a, b]) await until("the screen stays on", () => page.evaluate(() => globalThis.wakeLock?.released === false));
    await card(canceller, canceller === a ? "out" : "in", `long ${i}`).getByRole("button", { name: "Cancel" }).click();
    await allow(b, Infinity); // what was being written
    const other = canceller === a ? card(b, "in", `long ${i}`) : card(a, "out", `long ${i}`);
    await other.getByText("Cancelled by the other device").waitFor();
    await until("the disk gives up what it had", () => b.evaluate(() => disk.end === "aborted"));
    assert.equal(await save(b, `next ${i}`), sum);
    for (const page of [a, b]) await until("the screen may go off", () => page.evaluate(() => wakeLock.released));
  }
  clean(a, b);
});

test("two who cannot connect are told why, where it may be that no relay was left for them", async (t) => {
  for (const [env, words] of [
    [{}, /^Still connecting\. This server offers no way through firewalls \(STUN or TURN\)/],
    [{ STUN_URLS: "stun:127.0.0.1:9" }, /^Still connecting\. Perhaps these networks/],
    [{ TURN_URLS: "turn:127.0.0.1:9", TURN_SECRET: "s" }, /^Still connecting\..* your network has used up its share/],
  ]) {
    const { url } = await startParley(t, env);
    for (let i = 0; i < 30; i++) await fetch(url + "/rendezvous/code", { method: "POST" });
    const init = () => (RTCPeerConnection.prototype.addIceCandidate = async () => {});
    const [a, b] = [await openDevice(t, browser, url, { init }), await openDevice(t, browser, url, { init })];
    await typeCode(b, await mintCode(a));
    for (const page of [a, b]) {
      await says(page, "#status", /^Connecting to the other device$/);
      await page.evaluate(() => {
        const now = Date.now;
        Date.now = () => now() + 30_000;
      });
      await says(page, "#status", words);
    }
    clean(a, b);
  }
});

test("a large file can be declined, and another is sent", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = await pairByLink(t, browser, url);
  await sendRandom(a, { "film.mkv": 70 * MiB });
  await card(a, "out", "film.mkv", "offered").getByText("Waiting").waitFor();
  await card(b, "in", "film.mkv", "offered").getByText("Where should it go?").waitFor();
  await card(b, "in", "film.mkv").getByRole("button", { name: "Decline" }).click();
  await card(a, "out", "film.mkv", "cancelled").getByText("Declined by the other device").waitFor();
  await transfer(a, b, "photo.jpg", 1000);
  clean(a, b);
});

test("files that were received stay, until they are removed", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = await pairByLink(t, browser, url);
  const [saved, kept] = await sendRandom(a, { saved: 1000, kept: 2000, removed: 3000 });
  assert.equal(await save(b, "saved"), saved);
  await card(b, "in", "removed", "done").getByRole("button", { name: "Remove removed" }).click();
  assert.equal(await card(b, "in", "removed").count(), 0);

  await b.click("#leave");
  await says(b, "#transfers-title", /^Files you have received$/);
  await card(b, "in", "saved", "done").waitFor();
  assert.equal(await save(b, "kept"), kept);

  await says(a, "#status", /^The other device has left, waiting for it$/);
  await a.click("#leave");
  assert.equal(await a.locator(".transfer").count(), 0);
  clean(a, b);
});

test("a file that is not saved yet outlives a new session, and one from a stranger is marked", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = await pairByCode(t, browser, url);
  const [sum] = await sendRandom(a, { unsaved: 1000 });
  await card(b, "in", "unsaved", "done").waitFor();
  await b.click("#differ");
  await b.click("#start-over");
  await card(b, "in", "unsaved").getByText("From a device that is not verified").waitFor();
  await b.click("#mint");
  await b.locator("#screen-code").waitFor();
  assert.equal(await save(b, "unsaved"), sum);
  await b.click("#leave");
  await b.click("#mint");
  await b.locator("#screen-code").waitFor();
  assert.equal(await card(b, "in", "unsaved").count(), 0, "what is saved makes room");
  clean(a, b);
});

test("a page that keeps files in memory asks before they are too much for it", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = await pairByLink(t, browser, url);
  await b.evaluate(() => delete window.showSaveFilePicker);
  const size = 300 * MiB;
  // As large as that they need not be made: they are never sent to their end.
  const offer = (name) => a.evaluate(([name, size]) => {
    const picked = new DataTransfer();
    picked.items.add(new File([new Blob(Array(size >> 20).fill(new Uint8Array(1 << 20)))], name));
    const input = document.querySelector("#files");
    input.files = picked.files;
    input.dispatchEvent(new Event("change"));
  }, [name, size]);
  await offer("one.iso");
  await card(b, "in", "one.iso", "active").waitFor();
  await offer("two.iso");
  await card(b, "in", "two.iso", "offered").getByText("This page will keep it in memory until you save it").waitFor();
  await card(b, "in", "one.iso").getByRole("button", { name: "Cancel" }).click();
  await card(b, "in", "two.iso").getByRole("button", { name: "Receive" }).click();
  await card(b, "in", "two.iso", "active").waitFor();
  await card(a, "out", "two.iso").getByRole("button", { name: "Cancel" }).click();
  await transfer(a, b, "small", 1000);
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

// --- By keyboard, and as a screen reader has it.

// tabTo presses Tab until what has the focus suits, and returns what was passed.
async function tabTo(page, name) {
  const passed = [];
  for (let i = 0; i < 20; i++) {
    await page.keyboard.press("Tab");
    const focus = await page.evaluate(() => {
      const it = document.activeElement;
      if (it === document.body) return null; // between the last and the first
      const shown = it.labels?.[0]?.classList.contains("button") ? it.labels[0] : it;
      return {
        name: it.getAttribute("aria-label") ?? it.labels?.[0]?.textContent ?? it.textContent,
        visible: getComputedStyle(shown).outlineStyle !== "none" && parseFloat(getComputedStyle(shown).outlineWidth) >= 2,
      };
    });
    if (!focus) continue;
    passed.push(focus.name);
    assert.ok(focus.visible, `${focus.name} shows that it has the focus`);
    if (focus.name === name) return passed;
  }
  throw new Error(`${name} is not reached by Tab, only ${passed.join(", ")}`);
}

test("with the keyboard only, from the code to the file", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = [await openDevice(t, browser, url), await openDevice(t, browser, url)];
  assert.deepEqual(await tabTo(a, "Connect"), ["Get a code", "Enter a code", "Connect"]);
  await a.keyboard.press("Shift+Tab");
  await a.keyboard.press("Shift+Tab");
  await a.keyboard.press("Enter");
  await a.locator("#screen-code").waitFor();
  assert.equal(await a.evaluate(() => document.activeElement.textContent), "Your code");
  const link = await a.textContent("#link");
  assert.deepEqual(await tabTo(a, "Copy"), [link, "Copy"]);

  await tabTo(b, "Enter a code");
  await b.keyboard.type("12");
  await b.keyboard.press("Enter");
  await says(b, "#error", /4 to 9 digits/);
  assert.equal(await b.getAttribute("#code-input", "aria-invalid"), "true");
  await b.keyboard.press("Control+A");
  await b.keyboard.type(await a.textContent("#code"));
  await b.keyboard.press("Enter");
  await connected(a, b);
  for (const page of [a, b]) {
    await page.locator("#compare").waitFor();
    await tabTo(page, "They match");
    await page.keyboard.press("Space");
    await says(page, "#verified", /^Verified by comparing$/);
  }

  await tabTo(a, "Choose files");
  const chooser = a.waitForEvent("filechooser");
  await a.keyboard.press("Enter");
  await (await chooser).setFiles({ name: "note.txt", mimeType: "text/plain", buffer: Buffer.from("by keyboard") });
  await card(b, "in", "note.txt", "done").waitFor();
  await tabTo(b, "Save note.txt");
  const download = b.waitForEvent("download");
  await b.keyboard.press("Enter");
  assert.equal((await download).suggestedFilename(), "note.txt");
  await tabTo(b, "Remove note.txt");
  await b.keyboard.press("Enter");
  assert.equal(await b.locator(".transfer").count(), 0);
  assert.notEqual(await b.evaluate(() => document.activeElement.tagName), "BODY", "the focus is not lost");

  await tabTo(b, "Leave");
  await b.keyboard.press("Enter");
  await says(a, "#status", /^The other device has left, waiting for it$/);
  clean(a, b);
});

test("a screen reader is told the names of things, and what happens", async (t) => {
  const { url } = await startParley(t);
  const a = await openDevice(t, browser, url);
  await a.getByRole("heading", { name: "Send files straight from one device to another." }).waitFor();
  await a.getByRole("textbox", { name: "Enter a code", description: "It is shown on the other device." }).waitFor();
  const code = await mintCode(a);
  await a.getByRole("img", { name: `Your code: ${[...code].join(" ")}` }).waitFor();
  await a.getByRole("img", { name: "QR code of the link" }).waitFor();

  const b = await openDevice(t, browser, url);
  await typeCode(b, "000000");
  await b.getByRole("alert").getByText("That code is wrong").waitFor();
  await typeCode(b, code);
  await b.getByRole("status").getByText("Connected directly").waitFor();
  const pictures = b.getByRole("list", { name: "Do both devices show the same?" });
  await pictures.waitFor();
  assert.equal(await pictures.getByRole("listitem").count(), 5);
  await giveDisk(b, 4 * MiB);
  await sendRandom(a, { "film.mkv": 70 * MiB });
  await b.getByRole("log").getByText("The other device offers film.mkv.").waitFor();
  await b.getByRole("button", { name: "Save film.mkv" }).click();
  await a.getByRole("progressbar", { name: "Sending film.mkv" }).waitFor();
  await b.getByRole("progressbar", { name: "Receiving film.mkv" }).waitFor();
  await a.getByRole("button", { name: "Cancel film.mkv" }).click();
  await b.getByRole("log").getByText("film.mkv: Cancelled by the other device").waitFor();
  clean(a, b);
});
