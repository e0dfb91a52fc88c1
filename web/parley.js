// parley.js: the client of a parley server, for browsers. One ES module without
// dependencies; parley.d.ts documents every function.
//
//   import { mint, redeem, connect } from "./parley.js";
//   const { code, appID } = await mint();               // on one device
//   const { appID } = await redeem(code);               // on the other
//   const session = connect({ appID, side: "A" });      // "B" on the other
//   const channel = await session.channel("chat");      // an RTCDataChannel
//
// A Link keeps a WebSocket up. A Negotiator makes one RTCPeerConnection. A
// Session is a seat in a pair, with one of each; a Room is a seat in a room,
// with one Link and a Negotiator for each member.

const SUBPROTOCOL = "parley.v1";

/** What went wrong: `code` is a word for programs, `message` a sentence for people. */
export class ParleyError extends Error {
  constructor(code, message, status = 0, retryAfter = undefined) {
    super(message);
    this.name = "ParleyError";
    this.code = code;
    this.status = status;
    if (retryAfter !== undefined) this.retryAfter = retryAfter;
  }
}

// --- Calls.

/** Mints a code. */
export async function mint(options = {}) {
  return { iceServers: [], ...(await call("POST", "/rendezvous/code", options, { ttl: options.ttl })) };
}

/** Redeems a code, which works once. */
export async function redeem(code, options = {}) {
  return { iceServers: [], ...(await call("POST", "/rendezvous/redeem", options, { code })) };
}

/** Opens a room. */
export async function openRoom(options = {}) {
  const { maxPlayers, password, ttl, locked } = options;
  return call("POST", "/api/rooms", options, { maxPlayers, password, ttl, locked });
}

/** What is known of a room, by ID or code. */
export async function getRoom(room, options = {}) {
  return call("GET", `/api/rooms/${encodeURIComponent(room)}`, options);
}

/** Changes a room. */
export async function changeRoom(room, change, options) {
  return call("PATCH", `/api/rooms/${encodeURIComponent(room)}`, options, change);
}

/** Deletes a room. */
export async function deleteRoom(room, options) {
  await call("DELETE", `/api/rooms/${encodeURIComponent(room)}`, options);
}

async function call(method, path, { server, token, signal }, body) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (token !== undefined) headers.Authorization = `Bearer ${token}`;
  let response, answer;
  try {
    response = await fetch(serverURL(server, path), { method, headers, signal, body: body && JSON.stringify(body), cache: "no-store" });
    answer = await response.json();
  } catch (error) {
    if (signal?.aborted) throw signal.reason;
    if (!response) throw new ParleyError("network", "The server cannot be reached.");
    throw new ParleyError("network", `The server's answer makes no sense (${response.status}).`, response.status);
  }
  if (!response.ok) {
    const wait = Number(response.headers.get("Retry-After"));
    throw new ParleyError(answer.code ?? "network", answer.error ?? response.statusText, response.status, wait > 0 ? wait : undefined);
  }
  const ahead = clockAhead(response);
  for (const time of ["createdAt", "expiresAt"]) if (answer[time]) answer[time] = new Date(Date.parse(answer[time]) + ahead);
  return answer;
}

// clockAhead returns by how many ms this device's clock is ahead of the server's,
// if it is by more than the second that a Date header is good for.
function clockAhead(response) {
  const ahead = Date.now() - Date.parse(response.headers.get("Date"));
  return Math.abs(ahead) > 2_000 ? ahead : 0; // NaN without the header
}

// serverURL returns the URL of a path on the server, which may itself be at a
// path of a host.
function serverURL(server, path) {
  const url = new URL(server ?? globalThis.location.origin);
  return new URL(url.pathname.replace(/\/$/, "") + path, url);
}

function socketURL(server, path, query) {
  const url = serverURL(server, path);
  url.protocol = url.protocol.replace("http", "ws");
  for (const [name, value] of Object.entries(query)) if (value !== undefined && value !== "") url.searchParams.set(name, value);
  return url;
}

// --- The link to the server.

const CONNECT_TIMEOUT = 10_000; // ms, from the start to the first frame
const PROBE_TIMEOUT = 5_000; //    ms, for the answer to a ping
const RETRY_FIRST = 500; //        ms, which grow with each try: a network that was
const RETRY_GROWTH = 1.6; //       away for 10 s is noticed within 8
const RETRY_MOST = 15_000; //      ms; half of it is random, for a server that restarts

// Close codes after which it is of no use to come back; from 4500 on none is.
const FINAL = new Set([1000, 1002, 1003, 1007, 1008, 1009, 1010, 1011]);

// A Link is a WebSocket that comes back after every end that does not mean
// "stay away". Browsers see neither pings nor, for minutes, a dead network: a
// link that has heard nothing for a heartbeat asks for a pong.
class Link {
  #url;
  #handle;
  #ws = null;
  #up = false;
  #attempt = 0;
  #retry = 0;
  #watch = 0;
  #probing = false;
  #heartbeat = 20_000;
  #closed = false;
  #wakeups = new AbortController();

  // handle has frame(frame), offline(attempt, delay) and closed(error); url
  // returns where to connect to.
  constructor(url, handle) {
    this.#url = url;
    this.#handle = handle;
    const options = { signal: this.#wakeups.signal };
    globalThis.addEventListener?.("online", () => this.#hurry(), options);
    globalThis.document?.addEventListener("visibilitychange", () => document.visibilityState === "visible" && this.#hurry(), options);
    this.#connect();
  }

  get up() {
    return this.#up;
  }

  // welcomed is called with the first frame that shows the seat is taken.
  welcomed(heartbeat = this.#heartbeat) {
    this.#up = true;
    this.#attempt = 0;
    this.#heartbeat = heartbeat;
    this.#expect(heartbeat);
  }

  send(frame) {
    if (this.#up) this.#ws.send(typeof frame === "string" ? frame : JSON.stringify(frame));
    return this.#up;
  }

  // close leaves for good. The server may have let us in already where this side
  // is still opening: to break that off would look like a lost network.
  close() {
    this.#end();
    const ws = this.#ws;
    if (ws?.readyState === WebSocket.CONNECTING) ws.onopen = () => ws.close(1000);
    else ws?.close(1000);
  }

  #connect() {
    this.#retry = 0;
    const ws = new WebSocket(this.#url(), SUBPROTOCOL);
    this.#ws = ws;
    ws.onmessage = ({ data }) => ws === this.#ws && this.#heard(data);
    ws.onerror = () => {}; // the close tells
    ws.onclose = ({ code, reason }) => ws === this.#ws && this.#down(code, reason);
    this.#expect(CONNECT_TIMEOUT);
  }

  #heard(data) {
    if (this.#closed) return;
    this.#probing = false;
    if (this.#up) this.#expect(this.#heartbeat);
    let frame;
    try {
      frame = JSON.parse(data);
    } catch {
      return; // the other side's, of an older client
    }
    this.#handle.frame(frame);
  }

  // expect has something happen unless anything is heard within ms.
  #expect(ms) {
    clearTimeout(this.#watch);
    this.#watch = setTimeout(() => {
      if (this.#up && !this.#probing) this.#probe();
      else this.#abandon();
    }, ms);
  }

  #probe() {
    this.#probing = true;
    this.send({ type: "ping" });
    this.#expect(PROBE_TIMEOUT);
  }

  // abandon gives a connection up that does not answer. A close without a code,
  // or with 1000, would give the seat up as well, were it to arrive after all.
  #abandon() {
    const ws = this.#ws;
    this.#ws = null;
    ws.onclose = ws.onmessage = null;
    ws.close(4000, "no answer");
    this.#down(1006, "");
  }

  #down(code, reason) {
    this.#up = this.#probing = false;
    clearTimeout(this.#watch);
    if (this.#closed) return;
    if (FINAL.has(code) || code >= 4500) {
      this.#end();
      this.#handle.closed(new ParleyError(...finalReason(code, reason), code));
      return;
    }
    this.#attempt++;
    const most = Math.min(RETRY_MOST, RETRY_FIRST * RETRY_GROWTH ** this.#attempt);
    const delay = Math.round(most * (0.5 + Math.random() / 2));
    this.#retry = setTimeout(() => this.#connect(), delay);
    this.#handle.offline(this.#attempt, delay);
  }

  // hurry does now what would be done soon: the network may just be back.
  #hurry() {
    if (this.#retry) {
      clearTimeout(this.#retry);
      this.#connect();
    } else if (this.#up && !this.#probing) {
      this.#probe();
    }
  }

  #end() {
    this.#closed = true;
    this.#up = false;
    clearTimeout(this.#retry);
    clearTimeout(this.#watch);
    this.#wakeups.abort();
  }
}

// finalReason returns the code and the message of the error that a close code
// stands for. Its reason is the word of the server's own error.
function finalReason(code, reason) {
  if (code === 1008) return ["busy", "Someone else is connected in this place."];
  const words = {
    taken_over: "Another connection has taken this place over.",
    unknown_session: "The session is unknown or has expired.",
    room_not_found: "The room is unknown or has ended.",
    room_is_full: "The room is full.",
    room_locked: "The room is locked.",
    wrong_password: "The password is wrong.",
    room_deleted: "The room was deleted.",
  };
  if (words[reason]) return [reason, words[reason]];
  return ["protocol", `The server ended the connection (${code} ${reason}).`];
}

// --- The connection to a peer.

const DISCONNECTED = 3_000; // ms, after which ICE that lost its path starts anew
const AFTER_YOU = 300; //      ms, that the polite side leaves the first offer to the other
const EARLY = 100; // candidates kept until there is a description

// A Negotiator makes an RTCPeerConnection by perfect negotiation (WebRTC,
// section 10.7): either side may change anything at any time, and of two offers
// that cross the impolite side's wins.
//
// Each RTCPeerConnection has a random ID, and each signal says which it is from
// and which it is for. So a page that was reloaded is noticed: its peer's
// connection is of no use any more, and is replaced.
class Negotiator {
  #polite;
  #lossy;
  #signal;
  #ready;
  #config;
  #on;
  #pc = null;
  #id = null;
  #remote = null; // ID of the other's RTCPeerConnection
  #certificates = null; // fingerprints of the other's, as its first description had them
  #offers = 0; // made; an answer names the one that it is to
  #over = null; // the error with which the server's part has ended
  #ignoring = false; // the offer that the candidates belong to was ignored
  #early = []; // candidates that came before a description
  #queue = Promise.resolve(); // offers are made, and signals handled, one after the other
  #channels = new Map();
  #restart = 0;
  #route = null; // as last told
  #closed = false;

  // polite returns whether this side gives way. signal sends one; where that is
  // lossy, some may never arrive. ready resolves
  // when there is somebody to negotiate with. config returns an RTCConfiguration.
  // on has peerconnection(pc), route(route) and failed().
  constructor({ polite, lossy = false, signal, ready, config, on }) {
    this.#polite = polite;
    this.#lossy = lossy;
    this.#signal = signal;
    this.#ready = ready;
    this.#config = config;
    this.#on = on;
  }

  get pc() {
    if (this.#closed) throw closedError("The connection to the other device was closed.");
    if (this.#pc?.signalingState === "closed") this.#drop(); // by the app
    if (!this.#pc) this.#create();
    return this.#pc;
  }

  channel(label, { ordered = true, maxRetransmits } = {}) {
    const pc = this.pc;
    if (this.#channels.has(label)) return this.#channels.get(label).opened;
    if (this.#over && !isConnected(pc)) throw this.#over;
    const id = channelID(label);
    for (const other of this.#channels.keys()) {
      if (channelID(other) === id) throw new ParleyError("protocol", `The labels ${label} and ${other} cannot be used together.`);
    }
    const channel = pc.createDataChannel(label, { negotiated: true, id, ordered, maxRetransmits });
    const entry = bothOpen(channel);
    this.#channels.set(label, entry);
    channel.addEventListener("close", () => this.#channels.get(label) === entry && this.#channels.delete(label));
    return entry.opened;
  }

  // receive handles a signal of the other side.
  receive(signal) {
    this.#inTurn(() => this.#closed || this.#receive(signal));
  }

  #inTurn(step) {
    this.#queue = this.#queue.then(step).catch((error) => this.#closed || console.warn("parley:", error));
  }

  // refresh takes new ICE servers into use.
  refresh() {
    try {
      this.#pc?.setConfiguration(this.#config());
    } catch {
      // closed by the app, or the browser cannot: it has those of the beginning
    }
  }

  // finish is called when there is no server any more to negotiate through: what
  // is open lives on, and nothing else will be.
  finish(error) {
    this.#over = error;
    if (!this.#pc || isConnected(this.#pc)) return;
    for (const { cancel } of this.#channels.values()) cancel(error);
  }

  // resumed is called when one of the two was away from the server. repeat says
  // that what was on its way to the other may be lost.
  resumed(repeat) {
    if (!this.#pc || isConnected(this.#pc)) return;
    if (repeat && this.#pc.signalingState === "have-local-offer") this.#describe();
    this.#pc.restartIce();
  }

  close() {
    this.#closed = true;
    this.#drop();
  }

  #drop() {
    clearTimeout(this.#restart);
    this.#pc?.close();
    // No browser tells the channels of the side that closes.
    for (const { cancel } of this.#channels.values()) cancel();
    this.#channels = new Map();
    this.#pc = null;
  }

  #create() {
    const pc = new RTCPeerConnection(this.#config());
    this.#pc = pc;
    this.#id = randomText(8);
    this.#certificates = null;
    this.#ignoring = false;
    this.#early = [];
    const current = () => pc === this.#pc;
    pc.addEventListener("negotiationneeded", async () => {
      if (!(await this.#ready())) return;
      if (this.#polite() && !pc.remoteDescription) {
        // The other side most likely begins at the same moment, and wins.
        await new Promise((resolve) => setTimeout(resolve, AFTER_YOU));
        if (pc.remoteDescription) return; // what is left open is asked for anew
      }
      this.#inTurn(async () => {
        // Where an offer is under way, what it leaves open is asked for anew.
        if (!current() || pc.signalingState !== "stable") return;
        await pc.setLocalDescription();
        if (!current()) return;
        this.#offers++;
        this.#describe();
      });
    });
    // In turn, a candidate goes behind the description that it belongs to.
    pc.addEventListener("icecandidate", ({ candidate }) => candidate && this.#inTurn(() => current() && this.#send({ candidate: candidate.toJSON() })));
    pc.addEventListener("connectionstatechange", () => current() && this.#changed());
    this.#on.peerconnection(pc);
  }

  #describe(offer = this.#offers) {
    const { type, sdp } = this.#pc.localDescription;
    this.#send({ description: { type, sdp }, offer });
  }

  #send(signal) {
    this.#signal({ ...signal, from: this.#id, to: this.#remote });
  }

  async #receive({ description, candidate, offer, from = null, to = null }) {
    if (from !== this.#remote && this.#remote !== null && this.#pc?.remoteDescription) this.#drop();
    else if (from === this.#remote && to !== null && to !== this.#id) return; // for one that was replaced
    this.#remote = from;
    const pc = this.pc;
    if (to !== null && to !== this.#id && description?.type !== "offer") return;
    if (description) await this.#describeRemote(pc, description, offer);
    else if (candidate && pc.remoteDescription) await this.#addCandidate(pc, candidate);
    else if (candidate && !this.#ignoring && this.#early.length < EARLY) this.#early.push(candidate);
  }

  async #describeRemote(pc, description, offer) {
    if (description.type === "answer") {
      // To an offer that was taken back, or repeated.
      if (pc.signalingState !== "have-local-offer" || (offer !== undefined && offer !== this.#offers)) return;
    } else if (description.type !== "offer") {
      return;
    }
    // A connection has one certificate for ever. Some browsers go on with the
    // first one whatever a later description says, so that who looks at those is
    // deceived: another certificate is another connection.
    const certificates = certificatesOf(description.sdp);
    if (this.#certificates !== null && certificates !== this.#certificates) {
      if (description.type === "answer") return;
      this.#drop();
      pc = this.pc;
    }
    this.#ignoring = !this.#polite() && description.type === "offer" && pc.signalingState !== "stable";
    if (this.#ignoring) {
      this.#early = [];
      // It may be that the other side never had ours.
      if (this.#lossy && pc.signalingState === "have-local-offer") this.#describe();
      return;
    }
    this.#certificates = certificates;
    await pc.setRemoteDescription(description);
    // Chromium may find no candidates after an offer that was taken back.
    clearTimeout(this.#restart);
    this.#restart = setTimeout(() => pc === this.#pc && pc.connectionState === "new" && pc.restartIce(), DISCONNECTED);
    for (const candidate of this.#early.splice(0)) await this.#addCandidate(pc, candidate);
    if (description.type === "offer") {
      await pc.setLocalDescription();
      if (pc === this.#pc) this.#describe(offer);
    }
  }

  async #addCandidate(pc, candidate) {
    try {
      await pc.addIceCandidate(candidate);
    } catch (error) {
      if (!this.#ignoring) console.warn("parley:", error); // others may do
    }
  }

  #changed() {
    const pc = this.#pc;
    clearTimeout(this.#restart);
    switch (pc.connectionState) {
      case "connected":
        this.#route = null;
        this.#tellRoute(pc);
        break;
      case "disconnected":
        this.#restart = setTimeout(() => pc === this.#pc && !isConnected(pc) && pc.restartIce(), DISCONNECTED);
        break;
      case "failed":
        this.#on.failed();
        pc.restartIce();
        break;
    }
  }

  // tellRoute says which route is taken, and again whenever that changes. The
  // statistics may be older than the connection and not have it yet.
  async #tellRoute(pc) {
    const transport = pc.sctp?.transport?.iceTransport;
    if (transport) transport.onselectedcandidatepairchange = () => this.#tellRoute(pc);
    for (let wait = 50; pc === this.#pc && isConnected(pc); wait = Math.min(2 * wait, 1000)) {
      const route = await routeOf(pc).catch(() => null);
      if (route && pc === this.#pc) {
        if (route !== this.#route) this.#on.route((this.#route = route));
        return;
      }
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}

// What the two ends of a channel say before anything else.
const HERE = "\0parley here";
const HERE_TOO = "\0parley here too";
const HERE_AGAIN = 250; // ms, for channels that lose messages

// bothOpen has a channel open once its other end is there. A negotiated channel
// is open as soon as there is a transport, and what is sent to an end that the
// other page has not made yet is lost. opened resolves with the channel; cancel
// makes it reject.
function bothOpen(channel) {
  const entry = {};
  const early = []; // what an unordered channel brings first
  entry.opened = new Promise((resolve, reject) => {
    let repeat = 0;
    let settled = false;
    let heard = false; // the other end, perhaps before this one is open
    const settle = (how, value) => {
      if (settled) return;
      settled = true;
      clearInterval(repeat);
      how(value);
      setTimeout(() => early.forEach((data) => channel.dispatchEvent(new MessageEvent("message", { data }))), 0);
    };
    entry.cancel = (error = closedError("The connection to the other device was closed.")) => settle(reject, error);
    const greet = () => channel.readyState === "open" && channel.send(HERE);
    const met = () => {
      channel.send(HERE_TOO);
      settle(resolve, channel);
    };
    channel.addEventListener("open", () => {
      greet();
      if (heard) met();
      else repeat = setInterval(greet, HERE_AGAIN);
    });
    channel.addEventListener("close", () => entry.cancel());
    channel.addEventListener("message", (event) => {
      const ours = event.data === HERE || event.data === HERE_TOO;
      if (!ours && settled) return;
      event.stopImmediatePropagation();
      if (!ours) return void (early.push(event.data) > EARLY && channel.close());
      heard = true;
      if (channel.readyState !== "open") return;
      if (event.data === HERE) met();
      else settle(resolve, channel);
    });
  });
  entry.opened.catch(() => {}); // whoever awaits it is told
  return entry;
}

function closedError(message) {
  return new ParleyError("closed", message);
}

function isConnected(pc) {
  return pc.connectionState === "connected";
}

// routeOf returns the kind of the candidates that a connection uses, or null where
// the statistics do not have them.
async function routeOf(pc) {
  const stats = await pc.getStats();
  let pair = null;
  stats.forEach((s) => {
    if (s.type === "transport" && s.selectedCandidatePairId) pair = stats.get(s.selectedCandidatePairId);
  });
  stats.forEach((s) => {
    if (!pair && s.type === "candidate-pair" && s.state === "succeeded" && (s.nominated || s.selected)) pair = s;
  });
  const kinds = [pair?.localCandidateId, pair?.remoteCandidateId].map((id) => stats.get(id)?.candidateType);
  if (!kinds[0]) return null;
  return ["relay", "prflx", "srflx"].find((kind) => kinds.includes(kind)) ?? "host";
}

// channelID is the stream of a data channel, the same on both sides: FNV-1a.
function channelID(label) {
  let hash = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(label)) hash = Math.imul(hash ^ byte, 0x01000193) >>> 0;
  return hash % 256; // some browsers have no more at first
}

function randomText(bytes) {
  return Array.from(crypto.getRandomValues(new Uint8Array(bytes)), (b) => b.toString(16).padStart(2, "0")).join("");
}

// certificatesOf returns the certificates that a description names.
function certificatesOf(sdp = "") {
  return [...new Set(Array.from(String(sdp).matchAll(/^a=fingerprint:\s*(.*?)\s*$/gim), ([, value]) => value.toLowerCase()))].sort().join();
}

// --- ICE servers.

const ASK_LATER = 60_000; // ms, where the server gives no credentials for now

// An ICEServers keeps the server's ICE servers, and asks for new ones when the
// credentials have a fifth of their life left.
class ICEServers {
  #ask;
  #timer = 0;
  #expires = 0;
  list = [];
  throttled = false; // there is no TURN server in the list, because of that

  constructor(ask) {
    this.#ask = ask;
  }

  // set takes servers with credentials that live ttl seconds; without a ttl
  // their user names say until when. throttled says that this time there are no
  // credentials: those of before are kept while they live.
  set(servers, ttl, throttled = false) {
    clearTimeout(this.#timer);
    this.throttled = throttled && Date.now() >= this.#expires;
    if (throttled) {
      if (this.throttled) this.list = servers ?? [];
      this.#timer = setTimeout(this.#ask, ASK_LATER);
      return;
    }
    this.list = servers ?? [];
    const user = this.list.map((s) => /^(\d+):/.exec(s.username ?? "")).find(Boolean);
    if (!user && !ttl) return;
    const life = ttl ? ttl * 1000 : user[1] * 1000 - Date.now();
    this.#expires = Date.now() + life;
    const soon = Math.max(life * 0.8 - 1_000, 1_000); // a second is lost where times are whole ones
    this.#timer = setTimeout(this.#ask, Math.min(soon, 2 ** 31 - 1));
  }

  stop() {
    clearTimeout(this.#timer);
  }
}

// --- A pair.

/** Connects to a session. */
export function connect(options) {
  return new Session(options);
}

const OUTBOX = 10_000; //    mails that wait for a connection, or for receipts
const MAIL_WINDOW = 32; //   of them on their way at once; a mailbox takes 256
const FULL_RETRY = 1_000; // ms, until a mail for a full mailbox is tried again
const ENVELOPE = 128; //     bytes of a frame around its payload, at most
const MAILBOX = 1 << 20; //  bytes that wait for one seat, at most

const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;

/** A seat in a session of two. */
export class Session extends EventTarget {
  #link;
  #negotiator;
  #ice;
  #rtc;
  #state = "connecting";
  #presence = "unknown";
  #peerV = 0;
  #route = null;
  #polite;
  #opened = false;
  #mailLimit = MAILBOX; // bytes
  #peerHere = deferred();

  #nextID = 1; //    goes on where a page of before, with the same sid, has stopped
  #outbox = []; //   mail { id, text, sent, resolve, reject } in order; id is 0 before it is first sent
  #window = MAIL_WINDOW;
  #full = 0; //    timer: the other's mailbox is full
  #watermark = 0; // the highest seq that was handled
  #acked = 0;

  constructor({ appID, side, sid = randomText(16), server, rtc = {} }) {
    super();
    // Browsers cannot see why a WebSocket was refused, so this is said here.
    if (!UUID.test(appID)) throw new ParleyError("bad_app_id", "appID must be a UUID, as mint() and redeem() give it.");
    if (side !== "A" && side !== "B") throw new ParleyError("bad_side", "side must be A or B.");
    if (sid === "" || byteLength(sid) > 128) throw new ParleyError("bad_sid", "sid must have 1 to 128 bytes.");
    Object.defineProperties(this, { appID: { value: appID }, side: { value: side }, sid: { value: sid } });
    this.#rtc = rtc;
    this.#polite = side === "B"; // which is what the welcome will say
    this.#ice = new ICEServers(() => this.#link.send({ type: "ice_servers" }));
    this.#negotiator = new Negotiator({
      polite: () => this.#polite,
      signal: (signal) => this.#signal(signal),
      ready: () => this.#mayOffer(),
      config: () => withServers(this.#rtc, this.#ice.list),
      on: {
        peerconnection: (pc) => {
          this.#route = null;
          emit(this, "peerconnection", { pc });
        },
        route: (route) => {
          this.#route = route;
          this.#link.send({ type: "telemetry", event: "ice-connected", mode: route });
          emit(this, "route", { route });
        },
        failed: () => this.#link.send({ type: "telemetry", event: "ice-failed", reason: "failed" }),
      },
    });
    this.#link = new Link(() => socketURL(server, "/ws", { appID, side, sid }), {
      frame: (frame) => this.#frame(frame),
      offline: (attempt, delay) => this.#offline(attempt, delay),
      closed: (error) => this.#end(error),
    });
  }

  get state() {
    return this.#state;
  }
  get presence() {
    return this.#presence;
  }
  get route() {
    return this.#route;
  }
  get iceServers() {
    return this.#ice.list;
  }
  get throttled() {
    return this.#ice.throttled;
  }

  send(payload) {
    return this.#post(JSON.stringify(payload === undefined ? null : payload));
  }

  peerConnection() {
    return this.#negotiator.pc;
  }

  async channel(label, options) {
    return this.#negotiator.channel(label, options);
  }

  close() {
    this.#link.close();
    this.#negotiator.close();
    if (this.#state !== "closed") this.#end(closedError("The session was closed."));
  }

  #frame(frame) {
    switch (frame.type) {
      case "welcome":
        return this.#welcome(frame);
      case "peer_joined":
        this.#peerV = frame.peerV ?? 0;
        return this.#peer("present", frame.resumed);
      case "peer_away":
        return this.#peer("away");
      case "peer_left":
        return this.#peer("absent");
      case "deliver":
        return this.#deliver(frame);
      case "queued":
        return this.#queued(frame);
      case "error":
        return this.#failed(frame);
      case "ice_servers":
        this.#ice.set(frame.iceServers, frame.ttl, frame.throttled);
        return this.#negotiator.refresh();
      case "offer":
      case "answer":
        return this.#negotiator.receive({ description: { type: frame.type, sdp: frame.sdp ?? frame.payload?.sdp } });
      case "ice":
        return this.#negotiator.receive({ candidate: frame.candidate ?? frame.payload });
      case "code_contested":
        return emit(this, "contested");
      case "bye":
      case "sender_ready":
        return emit(this, "frame", frame);
    }
  }

  #welcome({ polite, peer, peerV = 0, lastId = 0, heartbeat, maxMessage, iceServers, throttled }) {
    this.#polite = polite;
    this.#nextID = Math.max(this.#nextID, lastId + 1);
    this.#mailLimit = Math.min(maxMessage - ENVELOPE, MAILBOX);
    this.#link.welcomed(heartbeat);
    this.#ice.set(iceServers, undefined, throttled);
    this.#negotiator.refresh();
    const resumed = this.#opened;
    this.#opened = true;
    this.#state = "open";
    this.#hello();
    for (const mail of this.#outbox) mail.sent = false; // what had no receipt is sent again
    this.#flush();
    emit(this, "open", { resumed });
    this.#peerV = peer === "absent" ? this.#peerV : peerV;
    this.#peer(peer, resumed);
    if (resumed) this.#negotiator.resumed(!this.#peerV);
  }

  #hello() {
    if (this.#link.send({ type: "hello", deliveredUpTo: this.#watermark || undefined })) this.#acked = this.#watermark;
  }

  #peer(presence, resumed = false) {
    const before = this.#presence;
    this.#presence = presence;
    if (presence === "present" || (presence === "away" && this.#peerV)) this.#peerHere.resolve(true);
    else if (presence === "absent") this.#peerHere = this.#peerHere.done ? deferred() : this.#peerHere;
    if (before !== presence || resumed) emit(this, "presence", { presence, resumed });
    if (presence === "present" && resumed) this.#negotiator.resumed(!this.#peerV);
  }

  // mayOffer resolves when there is somebody to take an offer; made earlier its
  // candidates could be stale. Older clients leave offering to A.
  async #mayOffer() {
    await this.#peerHere.promise;
    return this.#state !== "closed" && (this.#peerV > 0 || !this.#polite);
  }

  // signal sends a step of the negotiation: as mail, which survives a cut, or
  // as an older client knows it.
  #signal(signal) {
    if (this.#peerV > 0) {
      this.#post(JSON.stringify({ $parley: "signal", ...signal })).catch(() => {});
    } else if (signal.description) {
      this.#link.send({ type: signal.description.type, sdp: signal.description.sdp });
    } else {
      this.#link.send({ type: "ice", candidate: signal.candidate });
    }
  }

  #post(text) {
    if (this.#state === "closed") return Promise.reject(closedError("The session is closed."));
    if (this.#outbox.length >= OUTBOX) return Promise.reject(new ParleyError("mailbox_full", `${OUTBOX} messages wait to be sent.`));
    return new Promise((resolve, reject) => {
      this.#outbox.push({ id: 0, text, sent: false, resolve, reject });
      this.#flush();
    });
  }

  #flush() {
    if (!this.#link?.up || this.#full) return;
    for (const mail of this.#outbox.slice(0, this.#window)) {
      if (mail.sent) continue;
      mail.sent = true;
      mail.id ||= this.#nextID++;
      if (byteLength(mail.text) > this.#mailLimit) {
        // The server would end the connection for it, or never have room.
        this.#settle(mail.id).reject(new ParleyError("too_large", `A message may have ${this.#mailLimit} bytes, as JSON.`));
      } else {
        this.#link.send(`{"type":"send","id":${mail.id},"payload":${mail.text}}`);
      }
    }
  }

  // settle takes a mail out of the outbox.
  #settle(id) {
    const i = this.#outbox.findIndex((mail) => mail.id === id);
    if (i < 0) return undefined;
    const [mail] = this.#outbox.splice(i, 1);
    setTimeout(() => this.#flush(), 0); // of several receipts at once
    return mail;
  }

  #queued({ id, seq }) {
    this.#window = MAIL_WINDOW;
    this.#settle(id)?.resolve({ seq });
  }

  #failed({ code, error, ref }) {
    if (ref === "hello") {
      // The server has begun anew: a watermark of before means nothing there. Or
      // it cannot tell at the moment.
      if (code === "bad_frame") this.#watermark = this.#acked = 0;
      setTimeout(() => this.#hello(), code === "bad_frame" ? 0 : FULL_RETRY);
      return;
    }
    const mail = this.#outbox.find(({ id }) => id === ref);
    if (!mail) return;
    if (code === "mailbox_full" || code === "over_capacity" || code === "backend_unavailable") {
      mail.sent = false;
      this.#window = 1; // so that nothing else overtakes it
      this.#full ||= setTimeout(() => {
        this.#full = 0;
        this.#flush();
      }, FULL_RETRY);
      return;
    }
    this.#settle(ref).reject(new ParleyError(code, error));
  }

  #deliver({ seq, payload }) {
    if (seq > this.#watermark) {
      this.#watermark = seq;
      if (payload?.$parley === "signal") this.#negotiator.receive(payload);
      else emit(this, "message", { payload, seq });
    }
    setTimeout(() => this.#acknowledge(), 0); // several at once
  }

  #acknowledge() {
    if (this.#acked === this.#watermark && this.#acked > 0) return;
    if (this.#link.send({ type: "delivered", upTo: this.#watermark })) this.#acked = this.#watermark;
  }

  #offline(attempt, delay) {
    this.#state = "offline";
    emit(this, "offline", { attempt, delay });
  }

  #end(error) {
    this.#state = "closed";
    this.#ice.stop();
    clearTimeout(this.#full);
    this.#peerHere.resolve(true);
    this.#negotiator.finish(error);
    for (const mail of this.#outbox.splice(0)) mail.reject(error);
    emit(this, "close", { error });
  }
}

// --- A room.

/** Joins a room, by ID or code. */
export function joinRoom(options) {
  return new Room(options);
}

/** A seat in a room. */
export class Room extends EventTarget {
  #link;
  #ice;
  #rtc;
  #state = "connecting";
  #id = null;
  #self = null;
  #host = null;
  #secret = undefined;
  #members = new Map();
  #negotiators = new Map();

  constructor({ room, displayName = "", password, server, rtc = {} }) {
    super();
    if (!room) throw new ParleyError("room_not_found", "room must be the code or the ID of a room.");
    if ([...displayName].length > 64 || /\p{Cc}/u.test(displayName)) {
      throw new ParleyError("bad_display_name", "displayName must have at most 64 characters, and no control characters.");
    }
    this.#rtc = rtc;
    this.#ice = new ICEServers(() => this.#link.send({ type: "ice_servers" }));
    // Once the ID is known it is used instead of the code, which may be guessed at no more.
    const url = () => socketURL(server, `/ws/signal/${encodeURIComponent(this.#id ?? room)}`, { displayName, password, resume: this.#secret });
    this.#link = new Link(url, {
      frame: (frame) => this.#frame(frame),
      offline: (attempt, delay) => {
        this.#state = "offline";
        emit(this, "offline", { attempt, delay });
      },
      closed: (error) => this.#end(error),
    });
  }

  get id() {
    return this.#id;
  }
  get self() {
    return this.#self;
  }
  get members() {
    return this.#members;
  }
  get host() {
    return this.#host;
  }
  get state() {
    return this.#state;
  }
  get iceServers() {
    return this.#ice.list;
  }
  get throttled() {
    return this.#ice.throttled;
  }

  peerConnection(peer) {
    return this.#negotiator(peer).pc;
  }

  async channel(peer, label, options) {
    return this.#negotiator(peer).channel(label, options);
  }

  close() {
    this.#link.close();
    for (const peer of [...this.#negotiators.keys()]) this.#forget(peer);
    if (this.#state !== "closed") this.#end(closedError("The room was left."));
  }

  #frame(frame) {
    switch (frame.type) {
      case "join":
        return frame.peers ? this.#joined(frame) : this.#add({ id: frame.from, displayName: frame.displayName });
      case "leave":
        this.#remove(frame.from);
        return this.#setHost(frame.host);
      case "offer":
      case "answer":
        return this.#receive(frame, { description: { type: frame.type, sdp: frame.payload?.sdp } });
      case "candidate":
        return this.#receive(frame, { candidate: frame.payload });
      case "ice_servers":
        this.#ice.set(frame.iceServers, frame.ttl, frame.throttled);
        for (const n of this.#negotiators.values()) n.refresh();
        return;
    }
  }

  #joined({ from, roomId, displayName, peers, host, resume, iceServers, throttled }) {
    const resumed = this.#self?.id === from;
    if (!resumed) for (const id of [...this.#members.keys()]) this.#remove(id);
    this.#id = roomId;
    this.#self = { id: from, displayName };
    this.#secret = resume;
    this.#ice.set(iceServers, undefined, throttled);
    this.#state = "open";
    this.#link.welcomed();
    emit(this, "open", { resumed });
    const here = new Set(peers.map(({ id }) => id));
    for (const id of [...this.#members.keys()]) if (!here.has(id)) this.#remove(id);
    for (const member of peers) this.#add(member);
    this.#setHost(host);
    for (const n of this.#negotiators.values()) {
      n.refresh();
      n.resumed(true);
    }
  }

  #add(member) {
    if (this.#members.has(member.id)) return;
    this.#members.set(member.id, member);
    emit(this, "join", member);
  }

  #remove(id) {
    const member = this.#members.get(id);
    this.#forget(id);
    if (this.#members.delete(id)) emit(this, "leave", member);
  }

  #setHost(host) {
    if (host === this.#host) return;
    this.#host = host;
    emit(this, "host", { host });
  }

  #receive({ from, payload }, signal) {
    if (!this.#members.has(from)) return;
    const { pc, ...rest } = payload ?? {};
    if (signal.candidate) signal.candidate = rest;
    this.#negotiator(from).receive({ ...signal, offer: pc?.offer, from: pc?.from, to: pc?.to });
  }

  #negotiator(peer) {
    let n = this.#negotiators.get(peer);
    if (n) return n;
    if (this.#state === "closed") throw closedError("The room was left.");
    if (!this.#members.has(peer)) throw new ParleyError("peer_not_found", "There is no such member in the room.");
    n = new Negotiator({
      polite: () => this.#self.id > peer,
      lossy: true,
      signal: ({ description, candidate, offer, from, to }) =>
        this.#link.send({ type: description?.type ?? "candidate", to: peer, payload: { ...(description ?? candidate), pc: { from, to, offer } } }),
      ready: async () => this.#state !== "closed",
      config: () => withServers(this.#rtc, this.#ice.list),
      on: {
        peerconnection: (pc) => emit(this, "peerconnection", { pc, peer }),
        route: (route) => {
          this.#link.send({ type: "telemetry", event: "ice-connected", mode: route });
          emit(this, "route", { route, peer });
        },
        failed: () => this.#link.send({ type: "telemetry", event: "ice-failed", reason: "failed" }),
      },
    });
    this.#negotiators.set(peer, n);
    return n;
  }

  #forget(peer) {
    this.#negotiators.get(peer)?.close();
    this.#negotiators.delete(peer);
  }

  #end(error) {
    this.#state = "closed";
    this.#ice.stop();
    for (const n of this.#negotiators.values()) n.finish(error);
    emit(this, "close", { error });
  }
}

// --- Small things.

function withServers(rtc, servers) {
  return { ...rtc, iceServers: [...(rtc.iceServers ?? []), ...servers] };
}

function byteLength(text) {
  return new TextEncoder().encode(text).length;
}

function emit(target, type, detail) {
  target.dispatchEvent(new CustomEvent(type, { detail }));
}

// deferred is a promise with its resolve, and whether it was called.
function deferred() {
  const d = { done: false };
  d.promise = new Promise((resolve) => {
    d.resolve = (value) => {
      d.done = true;
      resolve(value);
    };
  });
  return d;
}
