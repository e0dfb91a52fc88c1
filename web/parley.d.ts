// Types of parley.js, the client of a parley server.

/** Where the server is: an http(s) URL. In a page that the server serves it may be left out. */
export interface ServerOption {
  server?: string | URL;
}

/**
 * What went wrong, in a word. Most are the server's own, and in its
 * documentation. Besides them there are
 *
 * - `network`: no answer, or none that makes sense
 * - `closed`: the session, room or peer connection was closed on this side
 * - `busy`: another device sits in the seat
 * - `too_large`: a message has more bytes than the server takes
 * - `protocol`: the server does not speak this client's protocol
 */
export type ErrorCode =
  | "gone" | "bad_code" | "bad_ttl" | "too_many_attempts" | "rate_limited" | "too_many_codes" | "codes_exhausted"
  | "at_capacity" | "draining" | "backend_unavailable" | "internal_error" | "unauthorized" | "forbidden_origin"
  | "bad_app_id" | "bad_side" | "bad_sid" | "unknown_session" | "taken_over" | "busy"
  | "bad_display_name" | "room_not_found" | "room_is_full" | "room_locked" | "wrong_password" | "room_deleted" | "not_creator"
  | "mailbox_full" | "too_large" | "peer_not_found" | "network" | "closed" | "protocol" | (string & {});

export class ParleyError extends Error {
  constructor(code: ErrorCode, message: string, status?: number, retryAfter?: number);
  readonly name: "ParleyError";
  /** For programs; `message` is a sentence for people. */
  readonly code: ErrorCode;
  /** HTTP status of the answer, or the WebSocket's close code; 0 where there was neither. */
  readonly status: number;
  /** Seconds after which it is worth trying again, where the server said so. */
  readonly retryAfter?: number;
}

export interface Redeemed {
  /** ID of the session: give it to connect(). */
  appID: string;
  /** When the code expires, by this device's clock, whatever that says. The session lives on while someone is in it. */
  expiresAt: Date;
  /** As in an RTCConfiguration. connect() needs no telling: it asks for its own. */
  iceServers: RTCIceServer[];
}

export interface Minted extends Redeemed {
  /** 4 to 9 digits, to be redeemed once. */
  code: string;
}

/**
 * Mints a code. `ttl` is its life in seconds, at most the server's own and that
 * unless given; `token` a bearer token where minting asks for one.
 *
 * Rejects with a ParleyError: `rate_limited`, `too_many_codes`,
 * `codes_exhausted` and `at_capacity` have a `retryAfter`; `unauthorized`,
 * `bad_ttl`, `forbidden_origin`, `draining`, `network`. An abort of `signal`
 * rejects with its reason. Nothing is retried.
 */
export function mint(options?: ServerOption & { ttl?: number; token?: string; signal?: AbortSignal }): Promise<Minted>;

/**
 * Redeems a code, which works once.
 *
 * Rejects with a ParleyError: `gone` when the code is wrong, used or expired,
 * which the server does not tell apart; `bad_code` when it is none;
 * `too_many_attempts` with a `retryAfter`; else as mint(). Nothing is retried:
 * after `network` the code may have been used up.
 */
export function redeem(code: string, options?: ServerOption & { signal?: AbortSignal }): Promise<Redeemed>;

export interface ConnectOptions extends ServerOption {
  appID: string;
  /** Who minted is A, who redeemed is B. */
  side: "A" | "B";
  /**
   * The secret that claims the seat, 1 to 128 bytes; a random one unless given.
   * Keep it, and give it again to come back to the same seat after a reload.
   */
  sid?: string;
  /** Configuration of the peer connection; the server's iceServers are added to its own. */
  rtc?: RTCConfiguration;
}

/**
 * Connects to a session. Throws a ParleyError when an option cannot be
 * right: `bad_app_id`, `bad_side`, `bad_sid`. All else is told by events. A page
 * whose origin the server does not take stays `offline`: browsers cannot see
 * that refusal, the server's /whoami can.
 */
export function connect(options: ConnectOptions): Session;

/** How the other seat is: `away` is reserved for one whose connection dropped. */
export type Presence = "unknown" | "absent" | "present" | "away";

/** The kind of the candidates in use: `relay` is by a TURN server, all others are direct. */
export type Route = "host" | "srflx" | "prflx" | "relay";

export interface SessionEventMap {
  /** Connected to the server, for the first time or again. */
  open: CustomEvent<{ resumed: boolean }>;
  /** The connection to the server was lost; the next try is in `delay` ms. Nothing is lost meanwhile. */
  offline: CustomEvent<{ attempt: number; delay: number }>;
  /** The other seat changed. */
  presence: CustomEvent<{ presence: Presence; resumed: boolean }>;
  /** Mail from the other side, each once, in order. */
  message: CustomEvent<{ payload: unknown; seq: number }>;
  /** A relayed frame of an older client that parley.js does not use itself: `bye`, `sender_ready`. */
  frame: CustomEvent<{ type: string; [key: string]: unknown }>;
  /** Someone redeemed this session's code a second time. */
  contested: CustomEvent<undefined>;
  /** There is a new RTCPeerConnection, in place of one whose other end is gone. */
  peerconnection: CustomEvent<{ pc: RTCPeerConnection }>;
  /** The devices are connected to each other, directly or by a relay. */
  route: CustomEvent<{ route: Route }>;
  /** It is over, and will not reconnect. Data channels that are open stay open. */
  close: CustomEvent<{ error: ParleyError }>;
}

/**
 * A seat in a session of two. It reconnects by itself, with the same seat, for
 * as long as the server does not say that this is of no use, and repeats what
 * was not received.
 */
export class Session extends EventTarget {
  readonly appID: string;
  readonly side: "A" | "B";
  readonly sid: string;
  readonly state: "connecting" | "open" | "offline" | "closed";
  readonly presence: Presence;
  readonly route: Route | null;
  readonly iceServers: RTCIceServer[];
  /** The server left its TURN servers out: this network has them for as many sessions as it may. Say so where connecting fails. */
  readonly throttled: boolean;

  /**
   * Sends mail to the other side: anything that JSON can hold, of at most 1 MiB
   * or what the server takes. Resolves once the server keeps it, which it then
   * does until the other side has it, whether that is connected or not.
   *
   * While there is no connection it waits for one; after a reconnect it is
   * sent again if it had no receipt, and arrives once all the same. While the
   * other's mailbox is full it is tried again each second. Mail stays in order, but
   * that what a full mailbox refuses comes behind what was already on its way.
   *
   * Rejects with a ParleyError: `too_large`, `closed` when the session ended
   * first, `mailbox_full` when 10,000 wait here.
   */
  send(payload: unknown): Promise<{ seq: number }>;

  /**
   * The connection to the other device, made by perfect negotiation: add tracks
   * and channels on either side, at any time. It restarts ICE after a failure
   * and after the network was away. When the other page is another one than
   * before, there is a new one, and the event `peerconnection`.
   *
   * Throws the ParleyError `closed` once the session is closed on this side.
   */
  peerConnection(): RTCPeerConnection;

  /**
   * A data channel that both sides open under the same label, on the current
   * peer connection. Resolves once both have: nothing sent from then on comes
   * too early for the other. Asked for again, it is the same one, until that has
   * closed. `maxRetransmits` is a number of times, as for createDataChannel.
   *
   * Rejects with the ParleyError `closed` when the peer connection is replaced
   * or the session is closed before. A channel that is open needs no server; it
   * closes when the peer connection is replaced: ask for it at each event
   * `peerconnection`. With a client that is not parley.js, use
   * peerConnection().createDataChannel() instead.
   */
  channel(label: string, options?: { ordered?: boolean; maxRetransmits?: number }): Promise<RTCDataChannel>;

  /** Leaves for good: the seat is free, and the peer connection closed. What was not sent is rejected with `closed`. */
  close(): void;

  addEventListener<K extends keyof SessionEventMap>(type: K, listener: (event: SessionEventMap[K]) => void, options?: boolean | AddEventListenerOptions): void;
  addEventListener(type: string, listener: EventListenerOrEventListenerObject | null, options?: boolean | AddEventListenerOptions): void;
  removeEventListener<K extends keyof SessionEventMap>(type: K, listener: (event: SessionEventMap[K]) => void, options?: boolean | EventListenerOptions): void;
  removeEventListener(type: string, listener: EventListenerOrEventListenerObject | null, options?: boolean | EventListenerOptions): void;
}

export interface RoomInfo {
  id: string;
  code: string;
  creatorId: string;
  createdAt: Date;
  expiresAt: Date;
  maxPlayers: number;
  playerCount: number;
  hasPassword: boolean;
  locked: boolean;
}

/** What opening a room gives. `ownerToken` is only given where rooms are open to anyone. */
export interface OpenedRoom {
  roomId: string;
  /** 6 letters and digits, for people to type; upper and lower case are the same. */
  code: string;
  expiresAt: Date;
  ownerToken?: string;
}

/**
 * Opens a room for `maxPlayers`, 2 to 16. `ttl` is its life in seconds; a
 * `locked` room lets nobody in; `token` is a bearer token where rooms ask for one.
 *
 * Rejects with a ParleyError: `unauthorized`, `bad_max_players`,
 * `bad_password`, `bad_ttl`; `not_found` where the server has no rooms; else as
 * mint().
 */
export function openRoom(options?: ServerOption & {
  maxPlayers?: number; password?: string; ttl?: number; locked?: boolean; token?: string; signal?: AbortSignal;
}): Promise<OpenedRoom>;

/** What is known of a room, by ID or code. Rejects with a ParleyError: `room_not_found`, `too_many_attempts`, else as mint(). */
export function getRoom(room: string, options?: ServerOption & { signal?: AbortSignal }): Promise<RoomInfo>;

/**
 * Changes a room, all of it or nothing; `token` is the ownerToken, or that of
 * who opened it. An empty password removes it. Nobody has to leave for it.
 * Rejects with a ParleyError: `unauthorized`, `not_creator`, else as openRoom().
 */
export function changeRoom(room: string, change: { maxPlayers?: number; password?: string; locked?: boolean },
  options: ServerOption & { token: string; signal?: AbortSignal }): Promise<RoomInfo>;

/** Deletes a room; everyone in it is closed with `room_deleted`. Rejects as changeRoom(). */
export function deleteRoom(room: string, options: ServerOption & { token: string; signal?: AbortSignal }): Promise<void>;

export interface Member { id: string; displayName: string; }

export interface RoomEventMap {
  /** In the room, for the first time or again. After too long an absence it is under another ID: then `resumed` is false. */
  open: CustomEvent<{ resumed: boolean }>;
  /** The connection to the server was lost; the next try is in `delay` ms. The others see nothing of it. */
  offline: CustomEvent<{ attempt: number; delay: number }>;
  /** Someone is in the room: also those who were there before, after `open`. */
  join: CustomEvent<Member>;
  /** Someone has left for good. */
  leave: CustomEvent<Member>;
  /** Who has been in the room the longest is now someone else. All members agree on it. */
  host: CustomEvent<{ host: string }>;
  /** There is a new RTCPeerConnection to a member. */
  peerconnection: CustomEvent<{ pc: RTCPeerConnection; peer: string }>;
  /** The devices are connected to each other, directly or by a relay. */
  route: CustomEvent<{ route: Route; peer: string }>;
  /** It is over, and will not reconnect: `room_not_found`, `room_is_full`, `room_locked`, `wrong_password`, `room_deleted`, `closed`. */
  close: CustomEvent<{ error: ParleyError }>;
}

export interface JoinOptions extends ServerOption {
  /** The room's code or ID. */
  room: string;
  /** At most 64 characters. */
  displayName?: string;
  password?: string;
  /** Configuration of the peer connections; the server's iceServers are added to its own. */
  rtc?: RTCConfiguration;
}

/**
 * Joins a room. Throws a ParleyError when an option cannot be right:
 * `bad_display_name`, `room_not_found` for no room at all. All else is told by
 * events.
 */
export function joinRoom(options: JoinOptions): Room;

/**
 * A seat in a room. It reconnects by itself under the same ID, unseen by the
 * others, for as long as the server keeps the seat.
 */
export class Room extends EventTarget {
  readonly id: string | null;
  readonly self: Member | null;
  /** The others, by ID, in the order they came. */
  readonly members: ReadonlyMap<string, Member>;
  /** ID of the host. */
  readonly host: string | null;
  readonly state: "connecting" | "open" | "offline" | "closed";
  readonly iceServers: RTCIceServer[];
  /** The server left its TURN servers out: this network has them for as many sessions as it may. Say so where connecting fails. */
  readonly throttled: boolean;

  /**
   * The connection to another member, made by perfect negotiation as in a
   * Session. Throws a ParleyError: `peer_not_found`, `closed`.
   */
  peerConnection(peer: string): RTCPeerConnection;
  /** A data channel that both open under the same label, as in a Session. Rejects with `peer_not_found` and `closed`. */
  channel(peer: string, label: string, options?: { ordered?: boolean; maxRetransmits?: number }): Promise<RTCDataChannel>;
  /** Leaves for good, and closes all peer connections. */
  close(): void;

  addEventListener<K extends keyof RoomEventMap>(type: K, listener: (event: RoomEventMap[K]) => void, options?: boolean | AddEventListenerOptions): void;
  addEventListener(type: string, listener: EventListenerOrEventListenerObject | null, options?: boolean | AddEventListenerOptions): void;
  removeEventListener<K extends keyof RoomEventMap>(type: K, listener: (event: RoomEventMap[K]) => void, options?: boolean | EventListenerOptions): void;
  removeEventListener(type: string, listener: EventListenerOrEventListenerObject | null, options?: boolean | EventListenerOptions): void;
}
