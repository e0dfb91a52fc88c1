// Pictures of every screen of the demo page, for people to look at, in
// screenshots/. What a test can see of them is that nothing is wider than the screen.

import assert from "node:assert/strict";
import { test } from "node:test";

import { MiB, card, clean, connected, giveDisk, mintCode, mintLink, openDevice, says, sendRandom, typeCode } from "./demo-support.mjs";
import { startBrowser, startParley, until } from "./support.mjs";

const browser = await startBrowser(test);

const FORMS = {
  desktop: { viewport: { width: 1280, height: 800 } },
  phone: { viewport: { width: 390, height: 844 }, deviceScaleFactor: 2, isMobile: true, hasTouch: true },
  "small phone": { viewport: { width: 320, height: 568 }, deviceScaleFactor: 2, isMobile: true, hasTouch: true },
};

for (const [form, options] of Object.entries(FORMS)) {
  test(`every screen on a ${form}`, async (t) => {
    const { url } = await startParley(t);
    const a = await openDevice(t, browser, url, options);
    const b = await openDevice(t, browser, url);
    const picture = async (name) => {
      for (const colorScheme of ["light", "dark"]) {
        await a.emulateMedia({ colorScheme });
        await a.screenshot({ path: `screenshots/${form.replace(" ", "-")}-${name}-${colorScheme}.png` });
      }
      const [wide, seen] = await a.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
      assert.ok(wide <= seen, `${name} is ${wide} pixels wide, of which ${seen} are seen`);
    };
    await picture("start");
    await typeCode(a, "000000");
    await says(a, "#error", /wrong/);
    await picture("error");
    const code = await mintCode(a);
    await picture("code");
    await typeCode(b, code);
    await connected(a, b);
    await a.locator("#compare").waitFor();
    await picture("compare");

    await a.click("#match");
    await giveDisk(a, 4 * MiB);
    await sendRandom(b, { "notes of the meeting, with a very long name that does not fit.pdf": 300_000, "holiday.mov": 70 * MiB, "backup.tar": 70 * MiB });
    await card(a, "in", "notes", "done").waitFor();
    await sendRandom(a, { "photo of the lake.jpg": MiB });
    await card(a, "out", "lake", "done").waitFor();
    await card(a, "in", "holiday.mov").getByRole("button", { name: "Save" }).click();
    await until("there is a speed", async () => /left/.test(await card(a, "in", "holiday.mov").innerText()));
    await picture("transfers");
    await card(a, "in", "holiday.mov").getByRole("button", { name: "Cancel" }).click();
    await picture("ended");
    await a.click("#leave");
    await picture("left");

    const c = await openDevice(t, browser, (await mintLink(a)).replace(/\..{22}$/, "." + "A".repeat(22)));
    await a.locator("#screen-warning").waitFor();
    await picture("warning");
    clean(a, b, c);
  });
}
