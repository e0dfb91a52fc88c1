// examples/browser in a real browser: two pages of another origin than the
// server's chat.

import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { once } from "node:events";
import { test } from "node:test";

import { PATIENCE, startBrowser, startParley } from "./support.mjs";

const browser = await startBrowser(test);

// servePage serves the page as a static file server would, and returns its origin.
async function servePage(t) {
  const html = await readFile(new URL("../../examples/browser/index.html", import.meta.url));
  const server = createServer((request, response) => {
    if (new URL(request.url, "http://page").pathname !== "/") return void response.writeHead(404).end();
    response.writeHead(200, { "Content-Type": "text/html" }).end(html);
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => {
    server.closeAllConnections();
    server.close();
  });
  return `http://127.0.0.1:${server.address().port}`;
}

async function openPage(t, origin, server) {
  const context = await browser.newContext();
  t.after(() => context.close());
  const page = await context.newPage();
  page.setDefaultTimeout(PATIENCE);
  await page.goto(`${origin}/?server=${encodeURIComponent(server)}`);
  return page;
}

const redeem = async (page, code) => {
  await page.getByLabel("Code").fill(code);
  await page.getByRole("button", { name: "Connect" }).click();
};

const shows = (page, text) => page.getByText(text).first().waitFor();

test("two pages of another origin chat", async (t) => {
  const origin = await servePage(t);
  const { url } = await startParley(t, { DEV: "false", CORS_ORIGINS: origin });
  const [a, b] = [await openPage(t, origin, url), await openPage(t, origin, url)];

  await a.getByRole("button", { name: "Get a code" }).click();
  await shows(a, "The code is");
  const [code] = (await a.getByRole("status").textContent()).match(/\d{4,9}/);
  const wrong = (code[0] === "9" ? "8" : "9") + code.slice(1);
  await redeem(b, wrong);
  await shows(b, "unknown, has been used, or has expired");

  await redeem(b, code);
  for (const [from, to, line] of [[a, b, "<b>good morning</b>"], [b, a, "good evening"]]) {
    await from.getByLabel("Message").fill(line);
    await from.getByLabel("Message").press("Enter");
    await shows(from, `You: ${line}`);
    await shows(to, `They: ${line}`);
  }

  await a.close();
  await shows(b, "The other page has gone");
});

test("a server that does not know the origin: the page says so", async (t) => {
  const origin = await servePage(t);
  const { url } = await startParley(t, { DEV: "false" });
  const page = await openPage(t, origin, url);
  await page.getByRole("button", { name: "Get a code" }).click();
  await shows(page, "See CORS_ORIGINS");
});
