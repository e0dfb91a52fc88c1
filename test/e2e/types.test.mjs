// web/parley.d.ts: its types hold for an app that uses everything, and it names
// what web/parley.js exports, no more and no less.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { readFile } from "node:fs/promises";
import { test } from "node:test";
import { promisify } from "node:util";

const file = (path) => new URL(path, import.meta.url);

test("an app type-checks", async () => {
  const tsc = file("node_modules/typescript/bin/tsc").pathname;
  const options = ["--noEmit", "--strict", "--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom"];
  await promisify(execFile)(process.execPath, [tsc, ...options, file("types.mts").pathname]).catch(({ stdout, stderr }) => assert.fail(stdout + stderr));
});

test("what is exported is declared", async () => {
  const declared = [...(await readFile(file("../../web/parley.d.ts"), "utf8")).matchAll(/^export (?:function|class) (\w+)/gm)].map(([, name]) => name);
  assert.deepEqual(declared.sort(), Object.keys(await import("../../web/parley.js")).sort());
});

test("what is declared of a class is there", async () => {
  const { Session, Room, ParleyError } = await import("../../web/parley.js");
  const text = await readFile(file("../../web/parley.d.ts"), "utf8");
  for (const [type, made] of Object.entries({ Session, Room })) {
    const body = text.split(`export class ${type} `)[1].split("\n}\n")[0];
    const members = [...body.matchAll(/^ {2}(?:readonly )?(\w+)[(:<]/gm)].map(([, name]) => name);
    assert.ok(members.length > 5, `${type}: ${members}`);
    for (const name of members) {
      // appID, side and sid are the session's own.
      assert.ok(name in made.prototype || ["appID", "side", "sid"].includes(name), `${type} has no ${name}`);
    }
  }
  assert.deepEqual(Object.keys(new ParleyError("gone", "x", 410, 3)).sort(), ["code", "name", "retryAfter", "status"]);
});
