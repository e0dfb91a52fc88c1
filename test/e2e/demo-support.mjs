// What the tests of the demo page share: browsers with the page open, pairing
// as people do it, and files that are made in one page and hashed where they
// arrive.

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";

import { PATIENCE, until } from "./support.mjs";

export const MiB = 1 << 20;

/** A device: a page with storage of its own, which notes every error. `init` runs in it before anything else. */
export async function openDevice(t, browser, url, { init = () => {}, ...options } = {}) {
  const context = await browser.newContext({ acceptDownloads: true, ...options });
  t.after(() => context.close());
  context.setDefaultTimeout(PATIENCE);
  await context.addInitScript(init);
  const page = await context.newPage();
  page.errors = [];
  page.on("pageerror", (error) => page.errors.push(String(error)));
  page.on("console", (m) => m.type() === "error" && !/Failed to load resource|WebSocket connection to/.test(m.text()) && page.errors.push(m.text()));
  // Chromium opens choosers by itself until someone listens here, and headless
  // that is nowhere. An Enter that follows at once overtakes a late wish to listen.
  page.on("filechooser", () => {});
  await page.goto(url);
  return page;
}

export const clean = (...pages) => pages.forEach((page) => assert.deepEqual(page.errors, []));

export async function says(page, selector, words, ms) {
  let said;
  try {
    await until(`${selector} says ${words}`, async () => words.test((said = await page.locator(selector).innerText())), ms);
  } catch (error) {
    throw new Error(`${error.message}, but ${JSON.stringify(said)}`);
  }
}

export const connected = (...pages) => Promise.all(pages.map((page) => says(page, "#status", /^Connected directly$/)));

export const verifiedByLink = (...pages) => Promise.all(pages.map((page) => says(page, "#verified", /^Verified by link$/)));

export async function mintCode(page) {
  await page.click("#mint");
  await page.locator("#screen-code").waitFor();
  const code = await page.textContent("#code");
  assert.match(code, /^\d{4,9}$/);
  return code;
}

export async function typeCode(page, code) {
  await page.fill("#code-input", code);
  await page.press("#code-input", "Enter");
}

export async function mintLink(page) {
  await mintCode(page);
  return page.getAttribute("#link", "href");
}

/** Two devices, paired by link. */
export async function pairByLink(t, browser, url, options) {
  const a = await openDevice(t, browser, url, options);
  const b = await openDevice(t, browser, await mintLink(a), options);
  await connected(a, b);
  await verifiedByLink(a, b);
  return [a, b];
}

/** Two devices, paired by a code that was typed. */
export async function pairByCode(t, browser, url) {
  const [a, b] = [await openDevice(t, browser, url), await openDevice(t, browser, url)];
  await typeCode(b, await mintCode(a));
  for (const page of [a, b]) await page.locator("#compare").waitFor();
  return [a, b];
}

/** Picks files of random bytes, made in the page. Resolves with their SHA-256. */
export function sendRandom(page, files) {
  return page.evaluate(async (files) => {
    const picked = new DataTransfer();
    const sums = [];
    for (const [name, size] of Object.entries(files)) {
      const bytes = new Uint8Array(size);
      for (let at = 0; at < size; at += 65536) crypto.getRandomValues(bytes.subarray(at, at + 65536));
      const sum = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
      sums.push(Array.from(sum, (b) => b.toString(16).padStart(2, "0")).join(""));
      picked.items.add(new File([bytes], name));
    }
    const input = document.querySelector("#files");
    input.files = picked.files;
    input.dispatchEvent(new Event("change"));
    return sums;
  }, files);
}

/** The card of a transfer. */
export const card = (page, direction, name, state = "") =>
  page.locator(`.transfer[data-direction="${direction}"]${state && `[data-state="${state}"]`}`, { hasText: name });

/** Saves what was received, and resolves with its SHA-256. */
export async function save(page, name) {
  const link = card(page, "in", name, "done").locator("a[download]");
  const [download] = await Promise.all([page.waitForEvent("download"), link.click()]);
  assert.equal(download.suggestedFilename(), name);
  const hash = createHash("sha256");
  for await (const chunk of createReadStream(await download.path())) hash.update(chunk);
  return hash.digest("hex");
}

/** Sends a file of random bytes, and sees that it arrives as it was, and that the sender knows. */
export async function transfer(from, to, name, size) {
  const [sum] = await sendRandom(from, { [name]: size });
  assert.equal(await save(to, name), sum);
  await card(from, "out", name, "done").waitFor();
}

/**
 * Gives a page a save picker whose disk takes `allow` bytes, then waits: so a
 * transfer stands still where a test wants it to.
 */
export async function giveDisk(page, allow = Infinity) {
  await page.evaluate((allow) => {
    window.showSaveFilePicker = async ({ suggestedName }) => {
      const disk = (window.disk = { name: suggestedName, allow, stored: 0, parts: [], end: null });
      const createWritable = async () => ({
        async write(bytes) {
          while (disk.stored >= disk.allow) await new Promise((resolve) => setTimeout(resolve, 10));
          disk.parts.push(bytes.slice());
          disk.stored += bytes.length;
        },
        async close() {
          disk.end = "closed";
        },
        async abort() {
          disk.end = "aborted";
        },
      });
      return { createWritable };
    };
  }, allow);
}

export const allow = (page, bytes) => page.evaluate((bytes) => void (disk.allow = bytes), bytes);

export const stored = (page, bytes) => until(`${bytes} bytes are stored`, () => page.evaluate((bytes) => window.disk?.stored >= bytes, bytes));

/** The SHA-256 of what is on the disk. */
export const diskSum = (page) =>
  page.evaluate(async () => {
    const sum = await crypto.subtle.digest("SHA-256", await new Blob(disk.parts).arrayBuffer());
    return Array.from(new Uint8Array(sum), (b) => b.toString(16).padStart(2, "0")).join("");
  });

// onItsWay has a large file go from a to the disk of b, which takes 8 MiB for now.
export async function onItsWay(a, b) {
  await giveDisk(b, 8 * MiB);
  const [sum] = await sendRandom(a, { "film.mkv": 70 * MiB });
  await card(b, "in", "film.mkv").getByRole("button", { name: "Save" }).click();
  await stored(b, 8 * MiB);
  return sum;
}

// goesOn sees that more of it is stored.
export async function goesOn(b) {
  const more = (await b.evaluate(() => disk.stored)) + 8 * MiB;
  await allow(b, more);
  await stored(b, more);
}
