// The demo page as people use it: two devices, a code or a link, files either
// way; and everything that goes wrong in its own words.

import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { createReadStream } from "node:fs";
import { test } from "node:test";

import { chromium } from "playwright-core";

import { startParley, until } from "./support.mjs";

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-features=WebRtcHideLocalIpsWithMdns"],
});
test.after(() => browser.close());

async function device(t, url) {
  const context = await browser.newContext({ acceptDownloads: true });
  t.after(() => context.close());
  const page = await context.newPage();
  page.errors = [];
  page.on("pageerror", (error) => page.errors.push(String(error)));
  page.on("console", (m) => m.type() === "error" && !/Failed to load resource/.test(m.text()) && page.errors.push(m.text()));
  await page.goto(url);
  return page;
}

const clean = (...pages) => pages.forEach((page) => assert.deepEqual(page.errors, []));

async function mintCode(page) {
  await page.click("#mint");
  await until("a code", async () => /^\d{4,9}$/.test((await page.textContent("#code")).replace(/\s/g, "")));
  return (await page.textContent("#code")).replace(/\s/g, "");
}

async function typeCode(page, code) {
  await page.fill("#code-input", code);
  await page.press("#code-input", "Enter");
}

const says = (page, selector, words) =>
  until(`${selector} says ${words}`, async () => words.test((await page.textContent(selector).catch(() => "")) ?? ""));

// transfer sends a file and returns what arrives.
async function transfer(from, to, name, buffer) {
  await from.setInputFiles("#files", { name, mimeType: "application/octet-stream", buffer });
  const link = to.locator('.transfer[data-direction="in"][data-state="done"] a[download]').first();
  await link.waitFor({ timeout: 60_000 });
  const [download] = await Promise.all([to.waitForEvent("download"), link.click()]);
  assert.equal(download.suggestedFilename(), name);
  const hash = createHash("sha256");
  for await (const chunk of createReadStream(await download.path())) hash.update(chunk);
  assert.equal(hash.digest("hex"), createHash("sha256").update(buffer).digest("hex"));
}

test("by code: the people compare, and files go both ways", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = [await device(t, url), await device(t, url)];
  await typeCode(b, await mintCode(a));
  for (const page of [a, b]) await says(page, "#status", /connected/i);
  const shown = await Promise.all([a, b].map(async (page) => {
    await page.locator("#emoji").waitFor();
    await says(page, "#emoji", /\p{L}/u);
    return page.textContent("#emoji");
  }));
  assert.equal(shown[0], shown[1]);
  for (const page of [a, b]) await page.click("#match");
  await transfer(a, b, "from a.bin", randomBytes(3_000_000));
  await transfer(b, a, "from b.bin", randomBytes(100));
  await transfer(a, b, "empty.bin", Buffer.alloc(0));
  clean(a, b);
});

test("by link: nobody compares", async (t) => {
  const { url } = await startParley(t);
  const a = await device(t, url);
  const code = await mintCode(a);
  const link = await a.evaluate(() => {
    const e = document.querySelector("#link");
    return e.href || e.value || e.textContent;
  });
  assert.match(link, new RegExp(`^${url}/#${code}\\.[A-Za-z0-9_-]{22}$`));
  const b = await device(t, link);
  for (const page of [a, b]) await page.locator("#verified").waitFor({ state: "visible" });
  assert.ok(!b.url().includes(code), "the address bar still has the code");
  for (const page of [a, b]) assert.equal(await page.locator("#emoji").isVisible(), false);
  await transfer(b, a, "photo.jpg", randomBytes(200_000));
  clean(a, b);
});

test("64 MiB either way", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = [await device(t, url), await device(t, url)];
  await typeCode(b, await mintCode(a));
  for (const page of [a, b]) await says(page, "#status", /connected/i);
  const buffer = randomBytes(48 << 20); // what a test driver takes is bounded
  await transfer(a, b, "large.bin", buffer);
  await transfer(b, a, "large too.bin", buffer);
  clean(a, b);
});

test("codes that do not work, each in its own words", async (t) => {
  const { url } = await startParley(t, { REDEEM_FAILS: "3" });
  const [a, b, c] = [await device(t, url), await device(t, url), await device(t, url)];
  await typeCode(b, "0000");
  await says(b, "#error", /wrong|used|expired/i);
  const code = await mintCode(a);
  await typeCode(b, code);
  for (const page of [a, b]) await says(page, "#status", /connected/i);
  await typeCode(c, code);
  await says(c, "#error", /wrong|used|expired/i);
  for (const guess of ["111111", "222222", "333333"]) await typeCode(c, guess);
  await says(c, "#error", /too many|wait/i);
  clean(a, b, c);
});
