-- Puts a frame in mailboxes. KEYS[1] session; ARGV: instance, holder, the
-- sender's seat, to, r of relay or m of mail, the frame or payload, its size,
-- 1 to leave the receiver unnotified, and of mail its id, the one before, the
-- one after, and the lowest and the highest id that may not have been seen here,
-- in 20 digits each, "" for none.
local s, holding, from, to, kind = session(idOf(KEYS[1])), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local data, size, hold = ARGV[6], tonumber(ARGV[7]), ARGV[8] == '1'
local mine = from .. ':h'
if from == 'A' or from == 'B' then
  local o = other(from)
  fetch(s, 'k', mine, o .. ':h', o .. ':q', o .. ':w')
else
  fetch(s, 'k', mine, 'M')
  local fields = {}
  for _, name in ipairs(get(s, 'k') and names(s) or {}) do
    for _, field in ipairs({':h', ':q', ':w'}) do fields[#fields + 1] = name .. field end
  end
  if #fields > 0 then fetch(s, unpack(fields)) end
end
if not get(s, 'k') then return reply('gone') end
if holder(s, from) ~= holding then return reply('replaced') end

local held, corked, status = 0, {}, 'ok'

local function relay(name)
  local q = num(s, name .. ':q')
  if not holder(s, name) then
    local n = call('LLEN', queue(s, name))
    if n > 0 and (n >= WAIT_ITEMS or q + size > WAIT_BYTES) then
      drop('peer_absent', 1)
      return 'absent'
    end
    if not spare(s, size) then
      drop('over_capacity', 1)
      return 'overcapacity'
    end
  end
  push(s, name, data, size)
end

-- stored reports whether this claim's mail of this id has been stored.
local function stored(id)
  if id > (get(s, from .. ':i') or '') then return false end
  for lo, hi in string.gmatch(get(s, from .. ':g') or '', '(%d+)-(%d+)') do
    if lo <= id and id <= hi then return false end
  end
  return true
end

-- refuse notes that the id was not stored, as idLog.refuse does.
local function refuse(id)
  if id == '' or id <= (get(s, from .. ':i') or '') then return end
  local lo, hi = get(s, from .. ':r'), get(s, from .. ':R')
  if not lo or id < lo then set(s, from .. ':r', id) end
  if not hi or id > hi then set(s, from .. ':R', id) end
end

-- store notes that the id is stored, as idLog.store does.
local function store(id, before, after, seq)
  local gaps, changed = {}, false
  -- without adds what is left of a gap below the id, and returns what is above.
  local function without(lo, hi)
    if lo < id then gaps[#gaps + 1] = {lo, hi < id and hi or before} end
    if id < hi then return {lo > id and lo or after, hi} end
  end
  for lo, hi in string.gmatch(get(s, from .. ':g') or '', '(%d+)-(%d+)') do
    if id < lo or hi < id then
      gaps[#gaps + 1] = {lo, hi}
    else
      local above = without(lo, hi)
      gaps[#gaps + 1] = above
      changed = true
    end
  end
  if id > (get(s, from .. ':i') or '') then
    local refused = get(s, from .. ':r')
    local above = refused and without(refused, get(s, from .. ':R')) or {}
    changed = changed or refused
    set(s, from .. ':r', above[1])
    set(s, from .. ':R', above[2])
    set(s, from .. ':i', id)
    set(s, from .. ':j', seq)
  end
  if not changed then return end
  if #gaps > MAX_GAPS then
    local i = gaps[1][2] < id and id < gaps[2][1] and 2 or 1
    gaps[i][2] = table.remove(gaps, i + 1)[2]
  end
  for i, gap in ipairs(gaps) do gaps[i] = gap[1] .. '-' .. gap[2] end
  set(s, from .. ':g', #gaps > 0 and table.concat(gaps, ' '))
end

local seq = 0
local function mail(name)
  local id, box = ARGV[9], mailbox(s, name)
  if ARGV[12] ~= '' and ARGV[13] > (get(s, from .. ':i') or '') then -- but those that have been seen since
    refuse(string.format('%020.0f', math.max(tonumber(ARGV[12]), tonumber(get(s, from .. ':i') or 0) + 1)))
    refuse(ARGV[13])
  end
  if id ~= '' and stored(id) then
    seq = num(s, from .. ':j')
    for _, entry in ipairs(call('XRANGE', box, '-', '+')) do
      if entry[2][2] == from and entry[2][4] == id then seq = tonumber(string.match(entry[1], '^%d+')) end
    end
    return
  end
  local waits = num(s, name .. ':b')
  if call('XLEN', box) >= MAIL_ITEMS or waits + size > MAIL_BYTES then
    drop('mailbox_full', 1)
    refuse(id)
    return 'mailfull'
  end
  if not holder(s, name) and not spare(s, size) then
    drop('over_capacity', 1)
    refuse(id)
    return 'overcapacity'
  end
  local ever = num(s, name .. ':T') + size
  -- As far as the clock is: after a crash in which Redis has lost the latest
  -- seqs, those who have them would take new mail for old.
  seq = math.max(lastSeq(s, name) + 1, clockSeq())
  local first = call('EXISTS', box) == 0
  call('XADD', box, str(seq) .. '-0', 'f', from, 'i', id, 't', str(ever), 'd', data)
  if first then call('PEXPIRE', box, math.max(call('PTTL', s.key), 1)) end
  set(s, name .. ':s', seq)
  set(s, name .. ':T', ever)
  set(s, name .. ':b', waits + size)
  count(s, size)
  if id ~= '' then store(id, ARGV[10], ARGV[11], seq) end
end

local function post(name)
  local refused
  if kind == 'm' then refused = mail(name) else refused = relay(name) end
  if refused then
    status = refused
    return
  end
  local h = holder(s, name)
  if not h then return end
  if overfull(s, name, holding) then
    if isRoom(s) then
      wake(h, 'x')
      vacate(s, name)
      reserve(s, name)
      return
    end
    held = 1
  end
  if hold then corked[#corked + 1] = h else wake(h, 'n') end
end

if isRoom(s) then
  local found = to == '' and kind == 'r'
  for _, name in ipairs(names(s)) do
    if name ~= from and (found and to == '' or name == to) then
      post(name)
      if name == to then found = true end
    end
  end
  if not found then status = 'nopeer' end
else
  if to == '' then to = other(from) end
  if to == 'A' or to == 'B' then post(to) else status = 'nopeer' end
end
commit(s)
return reply(status, seq, held, corked)
