// How fast the demo page sends, beside a bare data channel on the same machine
// at the same time. A figure to look at, not a bound: machines differ.

import { test } from "node:test";

import { MiB, card, pairByLink, sendRandom } from "./demo-support.mjs";
import { startBrowser, startParley } from "./support.mjs";

const SIZE = 32 * MiB;
const ROUNDS = 3;

const browser = await startBrowser(test);

test("throughput beside a bare data channel", async (t) => {
  const { url } = await startParley(t);
  const [a, b] = await pairByLink(t, browser, url);
  const median = (values) => values.toSorted((x, y) => x - y)[values.length >> 1];
  const ratios = [];
  await throughDemo(a, b, "warm-up");
  for (let round = 0; round < ROUNDS; round++) {
    const before = await a.evaluate(bareChannel, SIZE);
    const demo = await throughDemo(a, b, `round ${round}`);
    const after = await a.evaluate(bareChannel, SIZE);
    const bare = (before + after) / 2;
    ratios.push(demo / bare);
    t.diagnostic(`demo ${demo.toFixed(1)} MiB/s, bare ${before.toFixed(1)} and ${after.toFixed(1)} MiB/s: ${(demo / bare).toFixed(2)}`);
  }
  t.diagnostic(`median ratio ${median(ratios).toFixed(2)}`);
});

// throughDemo times a file in the page that sends it, from its first byte until
// the other device has confirmed its checksum.
async function throughDemo(from, to, name) {
  const timed = from.evaluate(
    (name) =>
      new Promise((resolve) => {
        const find = (state) => [...document.querySelectorAll(`.transfer[data-state="${state}"] .t-name`)].some((e) => e.textContent === name);
        let begun = 0;
        const look = () => {
          if (!begun && find("active")) begun = performance.now();
          if (!find("done")) return;
          watch.disconnect();
          resolve(performance.now() - begun);
        };
        const watch = new MutationObserver(look);
        watch.observe(document.querySelector("#transfers"), { subtree: true, childList: true, attributeFilter: ["data-state"] });
      }),
    name,
  );
  await sendRandom(from, { [name]: SIZE });
  await card(to, "in", name, "done").waitFor();
  return SIZE / MiB / ((await timed) / 1000);
}

// bareChannel runs in a page: two connections in it, one channel, no work done
// on what goes over.
async function bareChannel(size) {
  const [from, to] = [new RTCPeerConnection(), new RTCPeerConnection()];
  from.onicecandidate = ({ candidate }) => candidate && to.addIceCandidate(candidate);
  to.onicecandidate = ({ candidate }) => candidate && from.addIceCandidate(candidate);
  const channel = from.createDataChannel("bare");
  channel.bufferedAmountLowThreshold = 1 << 20;
  const received = new Promise((resolve) => {
    to.ondatachannel = ({ channel: end }) => {
      let bytes = 0;
      end.binaryType = "arraybuffer";
      end.onmessage = ({ data }) => (bytes += data.byteLength) >= size && resolve();
    };
  });
  await from.setLocalDescription();
  await to.setRemoteDescription(from.localDescription);
  await to.setLocalDescription();
  await from.setRemoteDescription(to.localDescription);
  await new Promise((resolve) => (channel.onopen = resolve));
  const chunk = new Uint8Array(Math.min(256 * 1024, from.sctp.maxMessageSize)); // as the demo sends
  const begun = performance.now();
  for (let sent = 0; sent < size; sent += chunk.length) {
    if (channel.bufferedAmount > 4 << 20) await new Promise((resolve) => (channel.onbufferedamountlow = resolve));
    channel.send(chunk);
  }
  await received;
  const seconds = (performance.now() - begun) / 1000;
  from.close();
  to.close();
  return size / (1 << 20) / seconds;
}
