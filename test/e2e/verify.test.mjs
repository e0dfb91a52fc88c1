// web/verify.js over channels in memory: who is told what, when the two ends see
// the same connection, when they do not, and when one of them cheats.

import assert from "node:assert/strict";
import { test } from "node:test";

import { EMOJI, fingerprints, verify } from "../../web/verify.js";
import { channelPair } from "./fakes.mjs";

const KEY = new Uint8Array(16).fill(7);
const OTHER_KEY = new Uint8Array(16).fill(8);

const fingerprint = (n) => Array(32).fill(n.toString(16).padStart(2, "0")).join(":");
// Descriptions name a fingerprint once for the session or for each media line, in any case.
const description = (n) => ({ sdp: `v=0\r\na=fingerprint:SHA-256 ${fingerprint(n).toUpperCase()}\r\nm=x\r\na=FINGERPRINT:sha-256 ${fingerprint(n)}\r\n` });
const sees = (local, remote) => ({ localDescription: description(local), remoteDescription: description(remote) });

// between runs both ends, and returns for each the mode it came to or the name of its error, and its emoji.
async function between(a, b, { change } = {}) {
  const [channelA, channelB] = channelPair();
  if (change) channelA.change = change;
  const ends = await Promise.allSettled([
    verify({ role: "A", channel: channelA, patience: 500, ...a }),
    verify({ role: "B", channel: channelB, patience: 500, ...b }),
  ]);
  return {
    outcome: ends.map((end) => end.value?.mode ?? end.reason.name),
    emoji: ends.map((end) => end.value?.emoji),
  };
}

const alone = async (options) => {
  const [channel, other] = channelPair();
  const end = verify({ pc: sees(1, 2), role: "A", channel, patience: 200, ...options }).catch((error) => error.name);
  return { end, other };
};

test("sixty-four pictures with a name each", () => {
  assert.equal(EMOJI.length, 64);
  for (const field of ["symbol", "name"]) assert.equal(new Set(EMOJI.map((e) => e[field])).size, 64, field);
});

test("a key that both know proves a connection that both see alike", async () => {
  const { outcome } = await between({ pc: sees(1, 2), key: KEY }, { pc: sees(2, 1), key: KEY });
  assert.deepEqual(outcome, ["key", "key"]);
});

test("without a key at B both show the same five pictures", async () => {
  for (const key of [KEY, null]) {
    const { outcome, emoji } = await between({ pc: sees(1, 2), key }, { pc: sees(2, 1) });
    assert.deepEqual(outcome, ["compare", "compare"]);
    assert.equal(emoji[0].length, 5);
    assert.deepEqual(emoji[0], emoji[1]);
  }
});

test("the pictures are others each time", async () => {
  const { emoji: once } = await between({ pc: sees(1, 2) }, { pc: sees(2, 1) });
  const { emoji: again } = await between({ pc: sees(1, 2) }, { pc: sees(2, 1) });
  assert.notDeepEqual(once, again);
});

test("someone in between is noticed: by the key, or by the pictures", async () => {
  const inBetween = 9;
  const keyed = await between({ pc: sees(1, inBetween), key: KEY }, { pc: sees(2, inBetween), key: KEY });
  assert.deepEqual(keyed.outcome, ["PeerNotAuthentic", "PeerNotAuthentic"]);
  const compared = await between({ pc: sees(1, inBetween), key: KEY }, { pc: sees(2, inBetween) });
  assert.deepEqual(compared.outcome, ["compare", "compare"]);
  assert.notDeepEqual(compared.emoji[0], compared.emoji[1]);
});

test("another key, or none at the side that made it, is turned away", async () => {
  const other = await between({ pc: sees(1, 2), key: KEY }, { pc: sees(2, 1), key: OTHER_KEY });
  assert.deepEqual(other.outcome, ["PeerNotAuthentic", "PeerNotAuthentic"]);
  const none = await between({ pc: sees(1, 2) }, { pc: sees(2, 1), key: KEY });
  assert.deepEqual(none.outcome, ["PeerNotAuthentic", "PeerNotAuthentic"]);
});

test("a MAC that is sent back to who made it proves nothing", async () => {
  const { end, other } = await alone({ key: KEY });
  other.addEventListener("message", ({ data }) => other.send(data.replace('"role":"A"', '"role":"B"')));
  assert.equal(await end, "PeerNotAuthentic");
});

test("a nonce that was not committed to is noticed", async () => {
  const change = (text) => text.replace(/("t":"nonce","nonce":")[0-9a-f]{64}/, `$1${"00".repeat(32)}`);
  const { outcome } = await between({ pc: sees(1, 2) }, { pc: sees(2, 1) }, { change });
  assert.equal(outcome[1], "PeerNotAuthentic");
});

test("two that say they are the same side come to no end", async () => {
  const { outcome } = await between({ pc: sees(1, 2), key: KEY }, { pc: sees(2, 1), key: KEY, role: "A" });
  assert.deepEqual(outcome, ["VerifyFailed", "VerifyFailed"]);
});

test("nonsense, silence and an end of the connection are told as such", async () => {
  const nonsense = ["{no", "7", "null", '{"t":"nonce"}', '{"t":"hello","role":"B"}', `{"t":"hello","role":"B","hasKey":"${"x".repeat(2000)}"}`];
  for (const text of nonsense) {
    const { end, other } = await alone();
    other.peer.dispatchEvent(new MessageEvent("message", { data: text }));
    assert.equal(await end, "VerifyFailed", text);
  }
  assert.equal(await (await alone()).end, "VerifyFailed", "silence");
  const { end, other } = await alone({ patience: 60_000 });
  other.close();
  assert.equal(await end, "VerifyFailed", "an end");
});

test("certificates that change meanwhile are noticed", async () => {
  const pc = sees(1, 2);
  const change = (text) => {
    pc.remoteDescription = description(3);
    return text;
  };
  const { outcome } = await between({ pc, key: KEY }, { pc: sees(2, 1), key: KEY }, { change });
  assert.equal(outcome[0], "PeerNotAuthentic");
});

test("descriptions that name no, another or more than one fingerprint are refused", () => {
  const refused = (sdp) => assert.throws(() => fingerprints({ localDescription: { sdp }, remoteDescription: description(2) }, "A"), { name: "PeerNotAuthentic" });
  refused("v=0\r\n");
  refused(description(2).sdp); // the other's own
  refused(description(1).sdp + `a=fingerprint:sha-256 ${fingerprint(3)}\r\n`);
  refused(description(1).sdp + `a=fingerprint:sha-1 ${fingerprint(1).slice(0, 59)}\r\n`);
  refused(description(1).sdp + `a=fingerprint:sha-256 ${fingerprint(1)}:00\r\n`);
});
