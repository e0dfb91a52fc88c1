// demo.js: the page at /. It mints or redeems a code, keeps a session, verifies
// who is at the other end, and shows the files that go over.

import { mint, redeem, connect } from "./parley.js";
import { Transfer } from "./transfer.js";
import { verify, fingerprints } from "./verify.js";
import { qrcode } from "./vendor/qrcode.mjs";

const ASK_ABOVE = 64 * 1024 * 1024; //  bytes: larger files go to disk, where the browser can
const ASK_BEYOND = 512 * 1024 * 1024; // bytes of all files that the page keeps: no more without asking
const PATIENCE = 20_000; //             ms of connecting, after which the page says why it may take so long
const REOPEN = 1_000; //                ms, after which a channel that was closed is opened anew
const STORE = "parley-demo";

const $ = (id) => document.getElementById(id);
const hasPicker = () => "showSaveFilePicker" in window;

// --- State.

// The seat is what a reload needs to come back: { appID, side, sid, key, code,
// expiresAt, paired }. All else is of this page only.
let seat = null;
let session = null;
let pc = null;
let transfer = null;
let channel = null; //    "files", once it is open
let verified = null; //   null, "key", "compare", "match"
let proven = null; //     the fingerprints that were verified
let retryAt = 0; //       when the next try to reach the server is
let connectingSince = 0;
let ended = false; //     the server ended the session, while the devices are still connected
let unused = null; //     { code, key } of a link that did not get through yet
let busy = false; //      a code is being minted or redeemed
let connectedOnce = false; // on this peer connection
let screen = "";

function keep() {
  try {
    if (seat) sessionStorage.setItem(STORE, JSON.stringify(seat));
    else sessionStorage.removeItem(STORE);
  } catch {
    // without storage a reload begins anew
  }
}

function kept() {
  try {
    const it = JSON.parse(sessionStorage.getItem(STORE));
    return it?.appID && it.sid && (it.side === "A" || it.side === "B") ? it : null;
  } catch {
    return null;
  }
}

// --- Getting together.

async function getCode() {
  await once(async () => {
    const { code, appID, expiresAt } = await mint();
    const key = toBase64(crypto.getRandomValues(new Uint8Array(16)));
    enter({ appID, side: "A", sid: randomID(), key, code, expiresAt: expiresAt.getTime(), paired: false });
  });
}

async function join(code, key = null) {
  if (!/^\d{4,9}$/.test(code)) {
    invalid("A code has 4 to 9 digits.");
    return;
  }
  unused = { code, key };
  $("code-input").value = code;
  await once(async () => {
    const { appID } = await redeem(code);
    unused = null;
    enter({ appID, side: "B", sid: randomID(), key, paired: true });
  });
}

async function once(work) {
  if (busy) return;
  busy = true;
  tell();
  $("mint").disabled = $("join").disabled = $("mint-again").disabled = true;
  try {
    await work();
  } catch (error) {
    if (!session) show("start");
    tell(words(error));
    if (error.code === "gone") {
      unused = null;
      $("code-input").select();
    }
  } finally {
    busy = false;
    $("mint").disabled = $("join").disabled = $("mint-again").disabled = false;
  }
}

// enter takes a seat, for the first time or after a reload.
function enter(newSeat) {
  leave();
  clearCards(({ url, saved }) => url && !saved);
  $("code-input").value = "";
  seat = newSeat;
  keep();
  session = connect({ appID: seat.appID, side: seat.side, sid: seat.sid });
  connectingSince = Date.now();
  listen(session);
  session.peerConnection();
  if (seat.paired) showRoom();
  else showCode();
  update();
}

function listen(s) {
  const on = (type, handle) => s.addEventListener(type, (event) => s === session && handle(event.detail));
  on("open", () => {
    retryAt = 0;
    update();
  });
  on("offline", ({ delay }) => {
    retryAt = Date.now() + delay;
    update();
  });
  on("presence", ({ presence }) => {
    if (presence === "present") {
      connectingSince = Date.now();
      paired();
    }
    update();
  });
  on("route", update);
  on("contested", () => notice("Someone else tried your code. Make sure that the right device is connected: compare, or start over with a new code."));
  on("peerconnection", ({ pc: fresh }) => meet(s, fresh));
  on("close", ({ error }) => over(error));
}

function paired() {
  if (seat.paired) return;
  seat.paired = true;
  seat.code = null;
  keep();
  showRoom();
}

// meet is called for each peer connection: the other page may be reloaded.
function meet(s, fresh) {
  transfer?.close("The connection to the other device was replaced.");
  pc = fresh;
  transfer = channel = verified = proven = null;
  connectedOnce = false;
  const current = () => s === session && fresh === pc;
  fresh.addEventListener("connectionstatechange", () => {
    if (!current()) return;
    if (fresh.connectionState === "connected") connectedOnce = true;
    update();
  });
  fresh.addEventListener("signalingstatechange", () => current() && recheck());
  update();
  talk(s, fresh);
}

// talk opens the channels, verifies who is at the other end, and lets files go.
async function talk(s, fresh) {
  const current = () => s === session && fresh === pc;
  try {
    const opening = s.channel("files");
    opening.then((files) => current() && ready(s, fresh, files), () => {});
    if (!verified) {
      const proof = await s.channel("verify");
      const result = await verify({ pc: fresh, channel: proof, role: seat.side, key: seat.key && fromBase64(seat.key) });
      await opening;
      if (!current()) return;
      verified = result.mode;
      proven = JSON.stringify(fingerprints(fresh, seat.side));
      if (result.mode === "compare") showEmoji(result.emoji);
      announce(result.mode === "key" ? "The other device is verified by the link." : "Compare the five pictures on both devices.");
    }
    await opening;
    if (!current()) return;
    transfer.release();
  } catch (error) {
    if (!current()) return;
    if (error.name === "PeerNotAuthentic") return notAuthentic();
    if (error.name === "VerifyFailed" && channel?.readyState === "open") return unverifiable(error);
    reopen(s, fresh);
  }
  update();
}

// reopen makes up for a channel that was closed while the devices are still
// connected. Who the other is stays proven.
function reopen(s, its) {
  setTimeout(() => {
    if (s === session && its === pc && verified && its.connectionState === "connected") talk(s, its);
  }, REOPEN);
}

function ready(s, fresh, files) {
  channel = files;
  connectedOnce = true;
  // Nothing goes over before it is known how the other device is verified.
  transfer = new Transfer({ channel: files, pc: fresh, held: true, askFirst });
  files.addEventListener("close", () => {
    if (files !== channel) return;
    update();
    reopen(s, fresh);
  });
  transfer.addEventListener("add", ({ detail }) => addCard(transfer, detail));
  transfer.addEventListener("update", ({ detail }) => updateCard(detail));
  paired();
  update();
}

// askFirst says whether a file that is offered waits until someone accepts it.
function askFirst({ size }) {
  return (hasPicker() && size > ASK_ABOVE) || size > ASK_BEYOND - inMemory();
}

// recheck makes sure that a renegotiation did not bring in someone else.
function recheck() {
  if (!proven) return;
  try {
    if (JSON.stringify(fingerprints(pc, seat.side)) === proven) return;
  } catch {
    // told below
  }
  notAuthentic();
}

// leave ends what there is, here and at the server.
function leave(reason = "The session was ended.") {
  const s = session;
  session = null; // its events are of no interest any more
  transfer?.close(reason);
  s?.close();
  seat = pc = transfer = channel = verified = proven = null;
  retryAt = connectingSince = 0;
  ended = connectedOnce = false;
  keep();
  notice();
  clearCards(({ url }) => url);
}

function over(error) {
  // Connected devices need no server, unless another tab has taken the seat.
  if (channel?.readyState === "open" && error.code !== "taken_over") {
    ended = true;
    update();
    return;
  }
  leave(words(error));
  show("start");
  update();
  tell(words(error));
}

function notAuthentic() {
  warn("Stop: this may not be the device you meant", "What the two devices see of each other does not match the link. Someone may be in between. Nothing more is sent or received. Start over, on another network if you can.");
}

function unverifiable(error) {
  warn("The connection could not be verified", `${error.message} Nothing more is sent or received. Start over with a new code.`);
}

function warn(title, text) {
  for (const item of received) {
    if (cards.get(item).owner !== transfer || !item.url) continue;
    item.note = "From a device that is not verified";
    cards.get(item).card.classList.add("doubtful");
    updateCard(item);
  }
  leave("Stopped: the other device is not verified.");
  tell();
  $("warning-title").textContent = title;
  $("warning-text").textContent = text;
  show("warning");
  update();
}

// --- Words.

function words({ code, message, retryAfter }) {
  const wait = retryAfter ? ` Try again in ${duration(retryAfter)}.` : " Try again later.";
  switch (code) {
    case "gone":
      return "That code is wrong, already used or expired; the server cannot tell which. Look at the digits again, or ask for a new code.";
    case "bad_code":
      return "A code has 4 to 9 digits.";
    case "too_many_attempts":
      return `Too many wrong codes came from your network.${wait}`;
    case "rate_limited":
      return `That was too much in a short time.${wait}`;
    case "too_many_codes":
      return `Your network has too many unused codes.${wait}`;
    case "codes_exhausted":
      return `All codes are taken at the moment.${wait}`;
    case "at_capacity":
      return `The server is full at the moment.${wait}`;
    case "draining":
      return "The server is about to restart. Try again in a moment.";
    case "network":
      return "The server cannot be reached. Check your network and try again.";
    case "busy":
      return "This code is in use by two other devices.";
    case "unknown_session":
      return "The server does not know this session any more. Start over with a new code.";
    case "taken_over":
      return "This session was opened in another tab or window, and goes on there.";
    case "unauthorized":
      return "This server gives codes only to those who are signed in.";
    case "forbidden_origin":
      return "This server does not accept calls from this page.";
    case "closed":
      return "The session was ended.";
    default:
      return message ?? "Something went wrong.";
  }
}

// status returns [state, sentence, when the next try is].
function status() {
  const open = channel?.readyState === "open";
  const connection = pc?.connectionState;
  if (open && connection === "connected") {
    const how = session.route === "relay" ? "Connected through a relay" : session.route ? "Connected directly" : "Connected";
    if (ended) return ["connected", `${how}. The server has ended this session; transfers go on.`];
    if (session.state !== "open") return ["connected", `${how}. The server is away; transfers go on.`];
    return ["connected", how];
  }
  if (ended) return ["interrupted", "The connection was interrupted. The server does not know this session any more."];
  if (session.state === "offline") return ["offline", "This device is offline, retrying", retryAt];
  if (session.state === "connecting") return ["connecting", "Connecting to the server"];
  if (session.presence === "away") return ["away", "The other device is away, waiting for it"];
  if (session.presence !== "present") return ["waiting", seat.paired && seat.side === "A" || connectedOnce ? "The other device has left, waiting for it" : "Waiting for the other device"];
  if (channel && !open && !verified) return ["interrupted", "The connection to the other device was closed. Reload this page to connect again."];
  if (connectedOnce) return ["interrupted", "The connection was interrupted, reconnecting"];
  if (Date.now() - connectingSince > PATIENCE) {
    if (session.throttled) return ["connecting", "Still connecting. Perhaps it takes a relay, and your network has used up its share of this server's. Try again in an hour, or from another network."];
    if (session.iceServers.length === 0) return ["connecting", "Still connecting. This server offers no way through firewalls (STUN or TURN), so both devices must be in one network."];
    return ["connecting", "Still connecting. Perhaps these networks do not let the devices reach each other."];
  }
  return ["connecting", "Connecting to the other device"];
}

function duration(seconds) {
  if (seconds < 60) return `${Math.ceil(seconds)} s`;
  if (seconds < 3600) return seconds < 600 && seconds % 60 >= 1 ? `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s` : `${Math.round(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

function size(bytes) {
  if (bytes < 1000) return `${Math.round(bytes)} B`;
  const units = ["kB", "MB", "GB", "TB"];
  let n = bytes / 1000;
  let i = 0;
  while (n >= 999.5 && i < units.length - 1) {
    n /= 1000;
    i++;
  }
  return `${n < 10 ? n.toFixed(1) : Math.round(n)} ${units[i]}`;
}

// --- Screens.

function show(name) {
  screen = name;
  for (const section of document.querySelectorAll("[data-screen]")) section.hidden = section.id !== `screen-${name}`;
  $("leave").hidden = !session;
  updateTransfers();
  // Whoever cannot see the screen change hears its title.
  document.querySelector(`#screen-${name} h2`).focus({ preventScroll: true });
  scrollTo(0, 0);
}

function showCode() {
  const { code, key, expiresAt } = seat;
  const link = `${location.origin}/#${code}.${key}`;
  $("code").textContent = code;
  $("code").classList.toggle("long", code.length > 5);
  $("code").setAttribute("aria-label", `Your code: ${[...code].join(" ")}`);
  $("host").textContent = location.host;
  $("local-only").hidden = !/^(localhost|127\..*|\[::1\])$/.test(location.hostname);
  $("link").textContent = $("link").href = link;
  $("copy").textContent = "Copy";
  drawQR(link);
  countdown(expiresAt);
  show("code");
}

// drawQR draws dark on white in dark mode too, with the margin that scanners need.
function drawQR(text) {
  const qr = qrcode(0, "M");
  qr.addData(text);
  qr.make();
  const n = qr.getModuleCount();
  let path = "";
  for (let row = 0; row < n; row++) {
    for (let col = 0; col < n; col++) if (qr.isDark(row, col)) path += `M${col + 4} ${row + 4}h1v1h-1z`;
  }
  const svg = svgElement("svg", { width: (n + 8) * 6, viewBox: `0 0 ${n + 8} ${n + 8}`, role: "img", "aria-label": "QR code of the link", "shape-rendering": "crispEdges" });
  svg.append(svgElement("rect", { width: n + 8, height: n + 8, fill: "#fff" }), svgElement("path", { d: path, fill: "#000" }));
  $("qr").replaceChildren(svg);
}

function svgElement(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function countdown(expiresAt) {
  const left = Math.max(0, Math.ceil((expiresAt - Date.now()) / 1000));
  const expired = left === 0;
  $("screen-code").classList.toggle("expired", expired);
  $("mint-again").hidden = !expired;
  $("countdown").textContent = expired ? "This code has expired" : `Valid for ${Math.floor(left / 60)}:${String(left % 60).padStart(2, "0")}`;
  return expired;
}

function showRoom() {
  show("room");
  update();
}

function showEmoji(emoji) {
  $("emoji").replaceChildren(...emoji.map(({ symbol, name }) => {
    const item = document.createElement("li");
    const picture = document.createElement("span");
    const label = document.createElement("small");
    picture.textContent = symbol;
    picture.setAttribute("aria-hidden", "true");
    label.textContent = name;
    item.append(picture, label);
    return item;
  }));
}

// update shows what is, wherever that changed.
function update() {
  updateTransfers();
  $("status-line").hidden = !session;
  $("leave").hidden = !session;
  if (!session) {
    setText($("status"), "");
    return;
  }
  const [state, sentence, until] = status();
  $("status-line").dataset.state = $("status").dataset.state = state;
  $("status").dataset.route = state === "connected" && session.route ? (session.route === "relay" ? "relay" : "direct") : "";
  setText($("status"), sentence);
  setText($("status-count"), until ? `in ${Math.max(0, Math.ceil((until - Date.now()) / 1000))} s` : "");

  setText($("verified"), verified === "key" ? "Verified by link" : verified === "match" ? "Verified by comparing" : "");
  $("verified").hidden = verified !== "key" && verified !== "match";
  $("unverified").hidden = !$("verified").hidden;
  $("compare").hidden = verified !== "compare";
  const may = transfer && verified && channel.readyState === "open";
  $("files").disabled = !may;
  $("drop").classList.toggle("off", !may);
  $("pick").classList.toggle("primary", verified !== "compare"); // first things first
}

// updateTransfers shows transfers beside the room, and what is left of them when
// that is gone.
function updateTransfers() {
  const some = $("transfers").childElementCount > 0;
  $("no-transfers").hidden = some;
  $("transfers-box").hidden = !some || screen === "warning";
  $("transfers-title").className = screen === "room" ? "sr" : "";
  setText($("transfers-title"), screen === "room" ? "Transfers" : "Files you have received");
}

// setText leaves alone what is the same, which would be read out again.
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function tell(sentence = "") {
  $("error").hidden = !sentence;
  $("error").textContent = sentence;
  $("code-input").removeAttribute("aria-invalid");
}

function invalid(sentence) {
  tell(sentence);
  $("code-input").setAttribute("aria-invalid", "true");
  $("code-input").focus();
}

function notice(sentence = "") {
  $("notice").hidden = !sentence;
  $("notice").textContent = sentence;
}

function announce(sentence) {
  const line = document.createElement("p");
  line.textContent = sentence;
  $("announce").append(line);
  while ($("announce").childElementCount > 20) $("announce").firstChild.remove();
}

// --- Cards of transfers.

const cards = new WeakMap(); // by item

function addCard(owner, item) {
  const card = $("transfer-template").content.firstElementChild.cloneNode(true);
  const part = (name) => card.querySelector(name);
  const it = { card, owner, bar: part("progress"), note: part(".t-note"), speed: part(".t-speed"), actions: part(".t-actions"), shown: "" };
  card.dataset.direction = item.direction;
  part(".t-name").textContent = item.name;
  part(".t-name").title = item.name;
  part(".t-size").textContent = size(item.size);
  it.bar.setAttribute("aria-label", `${item.direction === "out" ? "Sending" : "Receiving"} ${item.name}`);
  cards.set(item, it);
  if (item.direction === "in") received.add(item);
  $("transfers").prepend(card);
  updateCard(item);
  update();
  if (item.waiting) announce(`The other device offers ${item.name}.`);
}

// received has the files that came in, whichever session that was.
const received = new Set();

// inMemory returns how many bytes of files this page keeps, or will have to.
function inMemory() {
  let bytes = 0;
  for (const { url, disk, state, size } of received) if (url || (state === "active" && !disk)) bytes += size;
  return bytes;
}

// clearCards removes the cards of all transfers, except files that are to be kept.
function clearCards(keeps) {
  const kept = [...received].filter(keeps).map((item) => cards.get(item).card);
  for (const item of received) if (!keeps(item)) forget(item);
  for (const card of [...$("transfers").children]) if (!kept.includes(card)) card.remove();
}

function forget(item) {
  if (item.url) URL.revokeObjectURL(item.url);
  received.delete(item);
  cards.get(item).card.remove();
}

function updateCard(item) {
  const it = cards.get(item);
  if (!it) return;
  const { card, bar } = it;
  bar.value = item.size ? item.bytes / item.size : 1;
  setText(it.note, noteOf(item));
  setText(it.speed, item.state === "active" ? paceOf(item) : "");
  const now = `${item.state} ${item.waiting} ${item.saved}`;
  if (now === it.shown) return;
  it.shown = now;
  card.dataset.state = item.state;
  const hadFocus = it.actions.contains(document.activeElement);
  it.actions.replaceChildren(...actionsOf(it.owner, item));
  if (hadFocus) it.actions.querySelector("button, a")?.focus();
  if (item.state !== "offered" && item.state !== "active") announce(`${item.name}: ${item.note}`);
}

function noteOf(item) {
  switch (item.state) {
    case "offered":
      if (!item.waiting) return "Waiting";
      return hasPicker() ? "Where should it go?" : "This page will keep it in memory until you save it";
    case "active":
      return item.bytes >= item.size ? "Checking" : `${size(item.bytes)} of ${size(item.size)}`;
    default:
      return item.note;
  }
}

function paceOf({ bytes, size: total, speed, remaining }) {
  if (bytes >= total) return "";
  if (!(speed > 0)) return "–";
  return `${size(speed)}/s · ${duration(Math.ceil(remaining))} left`;
}

function actionsOf(owner, item) {
  if (item.state === "done" && item.url) {
    const link = document.createElement("a");
    Object.assign(link, { href: item.url, download: item.name, className: item.saved ? "button" : "button primary", textContent: "Save" });
    link.setAttribute("aria-label", `Save ${item.name}`);
    link.addEventListener("click", () => {
      item.saved = true; // or so it seems; a page is not told
      setTimeout(() => updateCard(item), 0);
    });
    const remove = button("Remove", "remove quiet", item, () => removeFile(item));
    remove.textContent = "✕";
    return [link, remove];
  }
  if (item.waiting) {
    const accept = hasPicker() ? button("Save", "primary", item, () => saveTo(owner, item)) : button("Receive", "primary", item, () => owner.accept(item));
    return [accept, button("Decline", "", item, () => owner.cancel(item))];
  }
  if (item.state === "offered" || item.state === "active") return [button("Cancel", "", item, () => owner.cancel(item))];
  if (item.file) return [button("Send again", "", item, () => sendAgain(item))];
  return [];
}

function button(text, className, item, act) {
  const it = document.createElement("button");
  Object.assign(it, { type: "button", textContent: text, className });
  it.setAttribute("aria-label", `${text} ${item.name}`);
  it.addEventListener("click", act);
  return it;
}

function sendAgain(item) {
  if (!sendFiles([item.file])) return;
  cards.get(item).card.remove();
  $("files").focus();
}

function removeFile(item) {
  forget(item);
  update();
  ($("transfers-box").hidden ? document.querySelector(`#screen-${screen} h2`) : $("transfers-title")).focus();
  announce(`${item.name} is removed.`);
}

async function saveTo(owner, item) {
  try {
    const handle = await window.showSaveFilePicker({ suggestedName: item.name });
    owner.accept(item, await handle.createWritable());
  } catch (error) {
    if (error.name !== "AbortError") notice(`${item.name} cannot be saved there. Choose another place.`);
  }
}

// --- Events.

$("mint").addEventListener("click", getCode);
$("mint-again").addEventListener("click", getCode);

$("join-form").addEventListener("submit", (event) => {
  event.preventDefault();
  // After an error that passes, the code of a link is tried again with its key.
  const code = $("code-input").value.replace(/[\s-]/g, "");
  join(code, code === unused?.code ? unused.key : null);
});

// A link may be pasted where a code is asked for.
$("code-input").addEventListener("paste", (event) => {
  const hash = /#(\S+)/.exec(event.clipboardData?.getData("text") ?? "");
  if (!hash) return;
  event.preventDefault();
  joinByLink(hash[1]);
});

$("leave").addEventListener("click", () => {
  leave();
  tell();
  show("start");
  update();
});
$("start-over").addEventListener("click", () => show("start"));

$("copy").addEventListener("click", async () => {
  let copied = false;
  try {
    await navigator.clipboard.writeText($("link").href);
    copied = true;
  } catch {
    // A page without a secure context has no clipboard; it can still select.
    getSelection().selectAllChildren($("link"));
    copied = document.execCommand?.("copy") ?? false;
  }
  $("copy").textContent = copied ? "Copied" : "Selected";
  announce(copied ? "The link is copied." : "The link is selected: copy it.");
});

$("match").addEventListener("click", () => {
  verified = "match";
  update();
  $("room-title").focus();
  announce("Verified by comparing.");
});
$("differ").addEventListener("click", () =>
  warn("Stop: the devices do not see each other", "The pictures differ, so someone may be in between, or this is another device than you think. Nothing more is sent or received. Start over with a new code."));

function sendFiles(files) {
  if (files.length === 0) return false;
  if (!transfer || !verified || channel.readyState !== "open") {
    notice("Files can be sent once the other device is connected.");
    return false;
  }
  notice();
  transfer.send(files);
  return true;
}

$("files").addEventListener("change", (event) => {
  sendFiles([...event.target.files]);
  event.target.value = "";
});

// A drop beside the target would open the file in place of the page.
let drags = 0;
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
const dragging = (n) => {
  drags = Math.max(0, n);
  $("overlay").hidden = drags === 0;
};
addEventListener("dragenter", (event) => hasFiles(event) && dragging(transfer ? drags + 1 : 0));
addEventListener("dragleave", (event) => hasFiles(event) && dragging(drags - 1));
addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  dragging(0);
  sendFiles([...event.dataTransfer.files]);
});

document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length === 0) return;
  event.preventDefault();
  sendFiles(files);
});

// What is under way, or only in this page, would be lost.
addEventListener("beforeunload", (event) => {
  if (transfer?.active || [...received].some(({ url, saved }) => url && !saved)) event.preventDefault();
});
addEventListener("hashchange", fromAddress);

// A phone that goes to sleep would break a transfer off.
let wakeLock = null; // a promise of one
function stayAwake() {
  if (transfer?.active && document.visibilityState === "visible") {
    wakeLock ??= navigator.wakeLock?.request("screen").catch(() => (wakeLock = null)); // tried again: the battery may be low
  } else {
    wakeLock?.then((lock) => lock?.release());
    wakeLock = null;
  }
}
document.addEventListener("visibilitychange", stayAwake); // browsers take it from what is hidden

setInterval(() => {
  stayAwake();
  if (!session) return;
  if (!seat.paired && countdown(seat.expiresAt)) seat.code && expire();
  update();
}, 1000);

function expire() {
  seat.code = null;
  announce("This code has expired. Get a new one.");
}

// fromAddress joins by the link that was opened. The key must not stay in the
// address bar, nor in the history.
function fromAddress() {
  const hash = location.hash.slice(1);
  if (!hash) return false;
  history.replaceState(null, "", location.pathname + location.search);
  joinByLink(hash);
  return true;
}

function joinByLink(hash) {
  const [code, key] = hash.split(".");
  // Without its key a link would prove nothing, and look as if it did.
  if (!/^\d{4,9}$/.test(code) || (key !== undefined && !/^[\w-]{22}$/.test(key)) || hash.split(".").length > 2) {
    if (!session) show("start");
    tell("This link is not complete. Open it again, or type the code.");
    return;
  }
  if (session) {
    leave();
    update();
  }
  show("start");
  join(code, key ?? null);
}

if (!globalThis.RTCPeerConnection) {
  show("start");
  $("mint").disabled = $("join").disabled = true;
  tell("This browser has no WebRTC, or it is switched off: devices cannot be connected.");
} else if (!fromAddress()) {
  const before = kept();
  if (before?.paired || (before?.code && before.expiresAt > Date.now())) enter(before);
  else show("start");
}

// --- Small things.

function randomID() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");
}

function toBase64(bytes) {
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

function fromBase64(text) {
  return Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (c) => c.charCodeAt(0));
}
