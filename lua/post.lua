-- Puts a frame in mailboxes. KEYS[1] session; ARGV: instance, holder, the
-- sender's seat, to, r of relay or m of mail, the frame or payload, its size,
-- 1 to leave the receiver unnotified, and of mail its id, the one before, the
-- one after, and the lowest id that may not have been seen here, in 20 digits
-- each, "" for none.
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
      return 'capacity'
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

local function refuse(id)
  if type(id) == 'number' then id = string.format('%020.0f', id) end
  local refused = get(s, from .. ':r')
  if id ~= '' and id > (get(s, from .. ':i') or '') and (not refused or id < refused) then
    set(s, from .. ':r', id)
  end
end

-- store notes that the id is stored, as idLog.store does.
local function store(id, before, after, seq)
  local gaps, refused = {}, get(s, from .. ':r')
  if id > (get(s, from .. ':i') or '') then
    if refused and refused < id then
      for gap in string.gmatch(get(s, from .. ':g') or '', '%S+') do gaps[#gaps + 1] = gap end
      gaps[#gaps + 1] = refused .. '-' .. before
    end
    set(s, from .. ':i', id)
    set(s, from .. ':j', seq)
    set(s, from .. ':r', nil)
    if #gaps == 0 then return end
  else
    for lo, hi in string.gmatch(get(s, from .. ':g') or '', '(%d+)-(%d+)') do
      if id < lo or hi < id then
        gaps[#gaps + 1] = lo .. '-' .. hi
      else
        if lo < id then gaps[#gaps + 1] = lo .. '-' .. before end
        if id < hi then gaps[#gaps + 1] = after .. '-' .. hi end
      end
    end
  end
  if #gaps > MAX_GAPS then table.remove(gaps, 1) end
  set(s, from .. ':g', #gaps > 0 and table.concat(gaps, ' '))
end

local seq = 0
local function mail(name)
  local id, box = ARGV[9], mailbox(s, name)
  if ARGV[12] ~= '' then -- none from there on, but those that have been seen since
    refuse(math.max(tonumber(ARGV[12]), tonumber(get(s, from .. ':i') or 0) + 1))
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
    return 'full'
  end
  if not holder(s, name) and not spare(s, size) then
    drop('over_capacity', 1)
    refuse(id)
    return 'capacity'
  end
  local ever = num(s, name .. ':T') + size
  -- As far as the clock is: after a crash in which Redis has lost the latest
  -- seqs, those who have them would take new mail for old.
  seq = math.max(lastSeq(s, name) + 1, math.floor(now() / 1000) - EPOCH_MS)
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
