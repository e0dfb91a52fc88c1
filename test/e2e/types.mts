// An app that uses all of the client's API, for the type checker alone.

import { ParleyError, changeRoom, connect, deleteRoom, getRoom, joinRoom, mint, openRoom, redeem } from "../../web/parley.js";
import type { Presence, Room, Route, Session } from "../../web/parley.js";

export async function pair(): Promise<void> {
  const { code, appID, expiresAt, iceServers } = await mint({ ttl: 60, token: "t", server: "https://parley.example" });
  const left: number = expiresAt.getTime() - Date.now();
  new RTCPeerConnection({ iceServers });
  const redeemed = await redeem(code, { signal: AbortSignal.timeout(left) });
  // @ts-expect-error: who redeems a code gets none.
  redeemed.code;
  // @ts-expect-error: there is no side C.
  connect({ appID, side: "C" });
  const session: Session = connect({ appID, side: "A", sid: "secret", rtc: { iceTransportPolicy: "relay" } });
  session.addEventListener("message", ({ detail: { payload, seq } }) => console.log(payload, seq.toFixed()));
  session.addEventListener("presence", ({ detail }) => {
    const presence: Presence = detail.presence;
    console.log(presence, detail.resumed);
  });
  session.addEventListener("route", ({ detail }) => {
    const route: Route = detail.route;
    console.log(route);
  }, { once: true });
  session.addEventListener("close", ({ detail: { error } }) => console.log(error.code === "taken_over", error.retryAfter ?? 0));
  const handle: EventListenerObject = { handleEvent: (event) => console.log(event.type) };
  session.addEventListener("open", handle);
  session.removeEventListener("open", handle);
  const { seq } = await session.send({ anything: [1, "two", null] });
  const channel: RTCDataChannel = await session.channel("chat", { ordered: false, maxRetransmits: 0 });
  channel.send(String(seq));
  session.peerConnection().addTransceiver("audio");
  session.close();
}

export async function room(): Promise<void> {
  const { roomId, code, ownerToken } = await openRoom({ maxPlayers: 4, password: "tea", locked: false });
  const joined: Room = joinRoom({ room: code, displayName: "Ada", password: "tea" });
  joined.addEventListener("join", async ({ detail: { id, displayName } }) => {
    const channel = await joined.channel(id, "game");
    channel.send(displayName);
  });
  joined.addEventListener("peerconnection", ({ detail: { pc, peer } }) => console.log(pc.connectionState, peer));
  for (const [id, member] of joined.members) console.log(id === joined.host, member.displayName);
  const info = await changeRoom(roomId, { locked: true }, { token: ownerToken ?? "" });
  console.log((await getRoom(info.code)).createdAt.toISOString());
  try {
    await deleteRoom(roomId, { token: "wrong" });
  } catch (error) {
    if (error instanceof ParleyError && error.code === "not_creator") console.log(error.status);
  }
  joined.close();
}
