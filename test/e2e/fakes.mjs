// Data channels in memory, for tests of what the demo page says over them.

/**
 * Two ends of an ordered, reliable channel. Messages arrive one by one, in later
 * turns of the event loop. An end's `change` may alter what it sends, or drop
 * it by returning null; `hold()` keeps what it sends until `flow()`.
 */
export function channelPair() {
  const ends = [new FakeChannel(), new FakeChannel()];
  ends[0].peer = ends[1];
  ends[1].peer = ends[0];
  return ends;
}

class FakeChannel extends EventTarget {
  readyState = "open";
  binaryType = "blob";
  bufferedAmountLowThreshold = 0;
  bufferedAmount = 0;
  sent = []; // texts as objects, and the sizes of binary messages
  change = (data) => data;
  #queue = [];
  #held = false;
  #due = false;

  send(data) {
    if (this.readyState !== "open") throw new DOMException("The channel is closed.", "InvalidStateError");
    const changed = this.change(typeof data === "string" ? data : data.slice());
    this.sent.push(typeof data === "string" ? JSON.parse(data) : data.length);
    if (changed === null) return;
    this.bufferedAmount += changed.length;
    this.#queue.push(changed);
    this.#schedule();
  }

  hold() {
    this.#held = true;
  }

  flow() {
    this.#held = false;
    this.#schedule();
  }

  close() {
    for (const end of [this, this.peer]) {
      end.readyState = "closed";
      end.dispatchEvent(new Event("close"));
    }
  }

  #schedule() {
    if (this.#due || this.#held || this.#queue.length === 0) return;
    this.#due = true;
    setImmediate(() => {
      this.#due = false;
      if (this.#held) return;
      const data = this.#queue.shift();
      const before = this.bufferedAmount;
      this.bufferedAmount -= data.length;
      if (before > this.bufferedAmountLowThreshold && this.bufferedAmount <= this.bufferedAmountLowThreshold) this.dispatchEvent(new Event("bufferedamountlow"));
      if (this.peer.readyState === "open") this.peer.dispatchEvent(new MessageEvent("message", { data: typeof data === "string" ? data : data.buffer }));
      this.#schedule();
    });
  }
}
