// web/vendor is other people's code, which the binary carries: byte for byte
// what they published, with the licence.

import assert from "node:assert/strict";
import { readFile, readdir } from "node:fs/promises";
import { test } from "node:test";

const file = (path) => new URL(path, import.meta.url);
const published = {
  "qrcode.mjs": "qrcode-generator/dist/qrcode.mjs",
  "noble-hashes/LICENSE": "@noble/hashes/LICENSE",
  ...Object.fromEntries(["_md", "_u64", "hmac", "sha2", "utils"].map((name) => [`noble-hashes/${name}.js`, `@noble/hashes/${name}.js`])),
};

test("vendored modules are what npm has", async () => {
  for (const [ours, theirs] of Object.entries(published)) {
    assert.ok((await readFile(file("../../web/vendor/" + ours))).equals(await readFile(file("node_modules/" + theirs))), ours);
  }
});

test("nothing else is vendored", async () => {
  const files = (await readdir(file("../../web/vendor"), { recursive: true, withFileTypes: true })).filter((entry) => entry.isFile());
  // qrcode.LICENSE is from its repository: the package has none.
  assert.equal(files.length, Object.keys(published).length + 1, files.map(({ name }) => name).join(" "));
});
