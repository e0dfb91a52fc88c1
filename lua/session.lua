-- What every script of the hub begins with: the clock, a session and its seats,
-- and the reply. redis.go puts before it what the operator has configured, in
-- microseconds and bytes:
-- RESUME_TTL, SESSION_TTL, ROOM_EMPTY_TTL, LEASE, MAX_SESSIONS, MAX_QUEUED,
-- HOLD, SLOW, LONG_QUEUE, WAIT_ITEMS, WAIT_BYTES, MAIL_ITEMS, MAIL_BYTES,
-- MAX_PRESENCE, PRESENCE_SIZE, TAKEOVERS, TAKEOVER_WINDOW, MAX_GAPS, EPOCH_MS,
-- clock(), the microseconds since 1970, and MARGIN, by which keys outlive what they
-- hold.
--
-- A session is one hash, parley:{id}. Its fields:
--   k  p of a pair, r of a room      C  created     X  when its code, or the
--   L  when the last one left        B  when two        room, expires; 0: never
--   O  outcomes reported                were first  W  the instance whose quota
--   F  what its seqs follow, where      connected      it counts to
--      that is ahead of C
-- of a room: n code, l locked, x seats, p password, I all else, M its members
-- and of each seat, after its name and a colon:
--   h  holder, "instance:number"     c  claim       v  protocol version
--   a  reserved until                q  bytes, and u presence frames, queued
--   w  1 if a sender waits           b  bytes of mail, T of all mail ever
--   s  last seq                      t  recent takeovers
--   i  highest id stored             j  its seq     r  lowest id refused above i
--   g  gaps below i                  d  display name                 R  the highest
-- beside it, for each seat, the list parley:{id}:q:<seat> of frames and the
-- stream parley:{id}:m:<seat> of mail.

local call = redis.call
local ME = ARGV[1] -- the instance that asks
local SESSIONS, ROOMS, AWAY, QUEUED = 'parley:sessions', 'parley:rooms', 'parley:away', 'parley:queued'
local LAST_SEQ = 'parley:seq' -- the highest seq of ended sessions, while it is ahead of the clock
local KEEP = RESUME_TTL + SESSION_TTL + 8 * LEASE -- how long a pair outlives the last look at it

local wakes, drops = {}, {}

local time
local function now()
  time = time or clock()
  return time
end

-- Numbers above 2^46 in a string: .. would round them.
local function str(n) return string.format('%.0f', n) end

local function expire(key, us)
  return call('PEXPIRE', key, math.max(math.ceil((us + MARGIN) / 1000), 1))
end

-- prolong lets a key that all sessions share live at least this long.
local function prolong(key, us)
  if call('PTTL', key) * 1000 < us + MARGIN then expire(key, us) end
end

-- tell sends an instance a notification, by the reply if it is this one.
local function tell(instance, message)
  if instance == ME then
    wakes[#wakes + 1] = message
  else
    call('PUBLISH', 'parley:wake:' .. instance, message)
  end
end

-- wake tells the holder of a seat to look, n, or why it is out.
local function wake(holder, kind)
  local instance, number = string.match(holder, '^(.-):(.*)$')
  tell(instance, kind .. number)
end

local function drop(reason, n)
  if n > 0 then drops[#drops + 1] = reason; drops[#drops + 1] = n end
end

local function reply(status, ...)
  return {status, wakes, drops, ...}
end

-- --- A session, of which fields are read when they are asked for, or all at
-- once, and written by commit.

local function idOf(key) return string.sub(key, 9, -2) end -- without parley:{ and }

local function session(id)
  return {id = id, key = 'parley:{' .. id .. '}', f = {}, dirty = {}, bytes = 0}
end

local function fetch(s, ...)
  local names = {...}
  local values = call('HMGET', s.key, ...)
  for i = 1, #names do s.f[names[i]] = values[i] end
end

local function load(id)
  local s = session(id)
  local raw = call('HGETALL', s.key)
  if #raw == 0 then return nil end
  for i = 1, #raw, 2 do s.f[raw[i]] = raw[i + 1] end
  s.whole = true
  return s
end

local function get(s, field)
  local v = s.f[field]
  if v == nil and not s.whole then
    v = call('HGET', s.key, field)
    s.f[field] = v
  end
  return v or nil
end

local function num(s, field) return tonumber(get(s, field) or 0) end

local function set(s, field, v)
  if type(v) == 'number' then v = str(v) end
  s.f[field] = v or false
  s.dirty[field] = true
end

-- count notes that n more bytes wait in the session.
local function count(s, n) s.bytes = s.bytes + n end

-- queued returns the bytes that wait in all sessions.
local function queued(s)
  return tonumber(call('HGET', QUEUED, 'all') or 0) + s.bytes
end

local function spare(s, n) return MAX_QUEUED == 0 or queued(s) + n <= MAX_QUEUED end

local function commitBytes(s)
  local n = s.bytes
  if n == 0 then return end
  s.bytes = 0
  if call('HINCRBY', QUEUED, s.id, n) == 0 then call('HDEL', QUEUED, s.id) end
  local all = call('HINCRBY', QUEUED, 'all', n)
  if all == n then
    expire(QUEUED, math.max(call('PTTL', SESSIONS) * 1000, LEASE))
  end
end

local function commit(s)
  commitBytes(s)
  if not next(s.dirty) then return end
  local put, del = {}, {}
  for field in pairs(s.dirty) do
    local v = s.f[field]
    if v then
      put[#put + 1] = field
      put[#put + 1] = v
    else
      del[#del + 1] = field
    end
  end
  s.dirty = {}
  if #put > 0 then call('HSET', s.key, unpack(put)) end
  if #del > 0 then call('HDEL', s.key, unpack(del)) end
end

local function isRoom(s) return get(s, 'k') == 'r' end

-- names returns the seats: A and B, or the members in the order they came.
local function names(s)
  if not isRoom(s) then return {'A', 'B'} end
  local all = {}
  for name in string.gmatch(get(s, 'M') or '', '[^\n]+') do all[#all + 1] = name end
  return all
end

local function setNames(s, all)
  set(s, 'M', #all > 0 and table.concat(all, '\n'))
end

local function other(name) return name == 'A' and 'B' or 'A' end
local function holder(s, name) return get(s, name .. ':h') end
local function reserved(s, name) return get(s, name .. ':a') end
local function occupied(s, name) return holder(s, name) or reserved(s, name) end
local function queue(s, name) return s.key .. ':q:' .. name end
local function mailbox(s, name) return s.key .. ':m:' .. name end

local function taken(s)
  local n = 0
  for _, name in ipairs(names(s)) do
    if occupied(s, name) then n = n + 1 end
  end
  return n
end

-- waiting reports whether a frame or mail waits in a pair.
local function waiting(s)
  for _, name in ipairs(names(s)) do
    if call('EXISTS', queue(s, name), mailbox(s, name)) > 0 then return true end
  end
  return false
end

-- ends returns when nothing will hold the session any more, if nobody comes.
local function ends(s)
  local expires = num(s, 'X')
  if isRoom(s) then
    if taken(s) > 0 then return expires end
    return math.min(expires, num(s, 'L') + ROOM_EMPTY_TTL)
  end
  if taken(s) > 0 then return math.max(expires, now() + KEEP) end
  if waiting(s) then return math.max(expires, num(s, 'L') + SESSION_TTL) end
  return expires
end

local function over(s) return ends(s) <= now() end

-- schedule renews the life of the session's keys, and says when to sweep it.
local function schedule(s)
  local at = ends(s)
  local life = isRoom(s) and num(s, 'X') - now() or at - now()
  expire(s.key, life)
  for _, name in ipairs(names(s)) do
    expire(queue(s, name), life)
    expire(mailbox(s, name), life)
  end
  call('ZADD', SESSIONS, str(at), s.id)
  prolong(SESSIONS, at - now())
  if isRoom(s) then prolong(ROOMS, life) end
end

-- --- Seats.

local function index(s, name) return s.id .. ' ' .. name end

local function seatsOf(holding) return 'parley:seats:' .. string.match(holding, '^(.-):') end

-- unseat takes the holder out of a seat.
local function unseat(s, name)
  local h = holder(s, name)
  if h then
    call('SREM', seatsOf(h), index(s, name))
    set(s, name .. ':h', nil)
  end
end

local function seat(s, name, h)
  unseat(s, name)
  set(s, name .. ':h', h)
  local key = seatsOf(h)
  call('SADD', key, index(s, name))
  prolong(key, math.max(KEEP, num(s, 'X') - now()))
end

local function unreserve(s, name)
  if reserved(s, name) then
    set(s, name .. ':a', nil)
    call('ZREM', AWAY, index(s, name))
  end
end

-- A frame in a list is "r", its type, "0" or "1" if binary, the length of the
-- sender's name, the name, and the data; or "p" and an event.
local function isEvent(frame) return string.sub(frame, 1, 1) == 'p' end

local function sizeOf(frame)
  if isEvent(frame) then return PRESENCE_SIZE end
  return #frame - 4 - string.byte(frame, 4, 4)
end

local function senderOf(frame)
  if isEvent(frame) then return nil end
  return string.sub(frame, 5, 4 + string.byte(frame, 4, 4))
end

-- push appends a frame of so many bytes to a seat's queue.
local function push(s, name, frame, size)
  local key = queue(s, name)
  if call('RPUSH', key, frame) == 1 then
    call('PEXPIRE', key, math.max(call('PTTL', s.key), 1))
  end
  set(s, name .. ':q', num(s, name .. ':q') + size)
  count(s, size)
end

-- filter keeps the frames that keep approves, and returns how many went.
local function filter(s, name, keep)
  local key = queue(s, name)
  local all, kept, size = call('LRANGE', key, 0, -1), {}, 0
  for _, frame in ipairs(all) do
    if keep(frame) then
      kept[#kept + 1] = frame
    else
      size = size + sizeOf(frame)
    end
  end
  if #kept == #all then return 0 end
  local life = call('PTTL', key)
  call('DEL', key)
  for i = 1, #kept, 1000 do
    call('RPUSH', key, unpack(kept, i, math.min(i + 999, #kept)))
  end
  if #kept > 0 and life > 0 then call('PEXPIRE', key, life) end
  set(s, name .. ':q', num(s, name .. ':q') - size)
  count(s, -size)
  return #all - #kept
end

local function dropPresence(s, name)
  if num(s, name .. ':u') > 0 then
    filter(s, name, function(frame) return not isEvent(frame) end)
    set(s, name .. ':u', nil)
  end
end

-- empty drops all that waits for a seat.
local function empty(s, name, why)
  local frames = call('LLEN', queue(s, name)) - num(s, name .. ':u')
  drop(why, frames + call('XLEN', mailbox(s, name)))
  count(s, -num(s, name .. ':q') - num(s, name .. ':b'))
  call('DEL', queue(s, name), mailbox(s, name))
  for _, field in ipairs({':q', ':u', ':b'}) do set(s, name .. field, nil) end
end

-- member returns who is in a room's seat, and host its host, as events have it.
local function member(s, name) return name .. '\0' .. (get(s, name .. ':d') or '') end
local function host(s) return names(s)[1] or '' end

-- event encodes a change of presence; kind and resumed are digits.
local function event(s, kind, resumed, v, who)
  return 'p' .. kind .. resumed .. '\0' .. v .. '\0' .. (who and who .. '\0' .. host(s) or '\0\0')
end

local JOINED, LEFT_AWAY, LEFT = '0', '1', '2'

-- announce queues an event for all who are connected but one; who has not
-- looked for very long is put out.
local function announce(s, by, e)
  for _, name in ipairs(names(s)) do
    local h = name ~= by and holder(s, name)
    if h then
      local waits = num(s, name .. ':u')
      if waits >= MAX_PRESENCE then
        wake(h, 's')
      else
        set(s, name .. ':u', waits + 1)
        push(s, name, e, PRESENCE_SIZE)
        wake(h, 'n')
      end
    end
  end
end

-- overfull reports whether by, which posts to a seat, should pause, and notes
-- that it waits.
local function overfull(s, name, by)
  local h = holder(s, name)
  if not h or h == by then return false end
  local size, bound = num(s, name .. ':q'), isRoom(s) and SLOW or HOLD
  if size <= math.min(bound, LONG_QUEUE) then return false end
  if not spare(s, 0) then bound = math.min(bound, LONG_QUEUE) end
  if size <= bound then return false end
  if not get(s, name .. ':w') then set(s, name .. ':w', '1') end
  return true
end

-- raiseSeq has the sessions to come begin behind seq.
local function raiseSeq(seq)
  if seq <= tonumber(call('GET', LAST_SEQ) or 0) then return end
  call('SET', LAST_SEQ, str(seq))
  expire(LAST_SEQ, (seq + EPOCH_MS) * 1000 - now())
end

-- clockSeq is the least seq that mail gets now.
local function clockSeq() return math.max(math.floor(now() / 1000) - EPOCH_MS, 0) end

-- finish ends a session; whoever is connected is told why.
local function finish(s, why)
  local last = 0
  for _, name in ipairs(names(s)) do
    local h = holder(s, name)
    if h then wake(h, why) end
    unseat(s, name)
    unreserve(s, name)
    empty(s, name, 'session_expired')
    last = math.max(last, tonumber(get(s, name .. ':s')) or 0)
  end
  if last > clockSeq() then raiseSeq(last) end
  commitBytes(s)
  if isRoom(s) then
    call('SREM', ROOMS, s.id)
    call('DEL', 'parley:room:' .. get(s, 'n'))
  end
  if get(s, 'W') then tell(get(s, 'W'), 'o' .. s.id) end
  call('DEL', s.key)
  call('ZREM', SESSIONS, s.id)
  s.gone = true
end

-- settle writes what has changed, and ends the session if that is over.
local function settle(s)
  if s.gone then return end
  if over(s) then
    finish(s, 'g')
  else
    schedule(s)
    commit(s)
  end
end

-- vacate takes the holder out of a seat, of which it keeps the relay frames.
local function vacate(s, name)
  unseat(s, name)
  dropPresence(s, name)
  set(s, name .. ':w', nil)
  set(s, 'L', now())
end

-- reserve keeps a vacant seat for whoever claimed it. Of a room nobody is told:
-- whom nobody sees go, nobody sees return.
local function reserve(s, name)
  local at = now() + RESUME_TTL
  set(s, name .. ':a', at)
  call('ZADD', AWAY, str(at), index(s, name))
  prolong(AWAY, math.max(KEEP, num(s, 'X') - now()))
  if not isRoom(s) then announce(s, name, event(s, LEFT_AWAY, 0, 0)) end
end

-- free makes a vacant seat free: what it left waiting for whoever is not
-- connected is stale, and those who are connected are told.
local function free(s, name)
  local stale = 0
  for _, peer in ipairs(names(s)) do
    if peer ~= name and not holder(s, peer) then
      stale = stale + filter(s, peer, function(frame) return senderOf(frame) ~= name end)
    end
  end
  drop('stale', stale)
  unreserve(s, name)
  if not isRoom(s) then
    for _, field in ipairs({':c', ':v', ':t'}) do set(s, name .. field, nil) end
    announce(s, name, event(s, LEFT, 0, 0))
    return
  end
  empty(s, name, 'peer_left')
  local who, left = member(s, name), {}
  for _, peer in ipairs(names(s)) do
    if peer ~= name then left[#left + 1] = peer end
  end
  setNames(s, left)
  for _, field in ipairs({'c', 'v', 't', 's', 'T', 'i', 'j', 'r', 'R', 'g', 'd', 'w'}) do
    set(s, name .. ':' .. field, nil)
  end
  announce(s, name, event(s, LEFT, 0, 0, who))
end

-- leave takes the holder out of a seat, for good or as one who may be back.
local function leave(s, name, forGood)
  vacate(s, name)
  if forGood or not get(s, name .. ':c') then
    free(s, name)
  else
    reserve(s, name)
  end
end

-- begin notes when a session was created, and what the seqs of its mailboxes follow.
local function begin(s)
  set(s, 'C', now())
  local last = tonumber(call('GET', LAST_SEQ) or 0)
  if last > clockSeq() then set(s, 'F', str(last)) end
end

-- lastSeq returns the last seq of a mailbox, or what its first will follow.
local function lastSeq(s, name)
  return tonumber(get(s, name .. ':s') or get(s, 'F')) or math.max(math.floor(num(s, 'C') / 1000) - EPOCH_MS, 0)
end

-- refusal returns the reply to who does not hold a seat, or nil.
local function refusal(s, name, holding)
  fetch(s, 'k', name .. ':h')
  if not get(s, 'k') then return reply('gone') end
  if holder(s, name) ~= holding then return reply('replaced') end
end
