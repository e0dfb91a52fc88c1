-- Takes a seat. KEYS[1] session; ARGV: instance, holder, p or r, name, claim,
-- version, create (1, or toomany: its owner may have no more), 1 if it counts
-- to a quota, resume, display name, password, 1 to be seated again after the
-- instance's lease was lost.
local id, holding, kind, name, claim = idOf(KEYS[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local v, create, counts, resume, displayName = ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local password, again = ARGV[11], ARGV[12] == '1'

local s = load(id)
if s and over(s) then
  finish(s, 'g')
  s = nil
end
local created = 0
if not s then
  if create == '' or kind == 'r' then return reply('gone') end
  if create ~= '1' then return reply(create) end
  if MAX_SESSIONS > 0 and call('ZCARD', SESSIONS) >= MAX_SESSIONS then return reply('capacity') end
  s = session(id)
  s.whole = true
  set(s, 'k', 'p')
  begin(s)
  set(s, 'L', now())
  set(s, 'X', 0)
  if counts == '1' then set(s, 'W', ME) end
  created = 1
end
if isRoom(s) ~= (kind == 'r') then return reply('gone') end

-- A takeover is allowed so often.
local function mayTakeOver()
  local recent = {}
  for at in string.gmatch(get(s, name .. ':t') or '', '%d+') do
    if now() - tonumber(at) < TAKEOVER_WINDOW then recent[#recent + 1] = at end
  end
  if #recent >= TAKEOVERS then return false end
  recent[#recent + 1] = str(now())
  set(s, name .. ':t', table.concat(recent, ' '))
  return true
end

local resumed, newcomer = 0, false
local function comeBack()
  resumed = 1
  local h = holder(s, name)
  if h == holding then return end
  if h then
    if again then return 'replaced' end
    if not mayTakeOver() then return 'takeovers' end
    wake(h, 'r')
    resumed = 2
  end
  unreserve(s, name)
  dropPresence(s, name)
end

-- A join that had no answer may have seated it already.
local there = kind == 'p' and holder(s, name) == holding
local refused
if there then
  resumed = 1
elseif kind == 'p' then
  if not occupied(s, name) then
    for _, field in ipairs({':i', ':j', ':r', ':R', ':g', ':t'}) do set(s, name .. field, nil) end
    set(s, name .. ':c', claim ~= '' and claim)
  elseif claim == '' or get(s, name .. ':c') ~= claim then
    refused = again and 'replaced' or 'busy'
  else
    refused = comeBack()
  end
else
  local mine
  for _, member in ipairs(names(s)) do
    if resume ~= '' and get(s, member .. ':c') == resume then mine = member end
  end
  if mine then
    name = mine
    there = holder(s, name) == holding
    refused = comeBack()
  elseif again then
    refused = 'gone'
  elseif (get(s, 'p') or '') ~= '' and get(s, 'p') ~= password then
    refused = 'password'
  elseif get(s, 'l') == '1' then
    refused = 'locked'
  elseif #names(s) >= num(s, 'x') then
    refused = 'full'
  else
    newcomer = true
    local all = names(s)
    all[#all + 1] = name
    setNames(s, all)
    set(s, name .. ':c', claim)
    set(s, name .. ':d', displayName)
  end
end
if refused then return reply(refused) end

seat(s, name, holding)
set(s, name .. ':v', v ~= '0' and v)
if not get(s, 'B') then
  local connected = 0
  for _, n in ipairs(names(s)) do
    if holder(s, n) then connected = connected + 1 end
  end
  if connected >= 2 then set(s, 'B', now()) end
end
local mail = call('EXISTS', mailbox(s, name))
if mail == 1 and call('XLEN', mailbox(s, name)) == 0 then mail = 0 end

local peer, peerV, held = 0, 0, 0
if kind == 'p' then
  local o = other(name)
  if overfull(s, o, holding) then held = 1 end
  if holder(s, o) then peer = 1 elseif reserved(s, o) then peer = 2 end
  if peer > 0 then peerV = num(s, o .. ':v') end
  if not there then announce(s, name, event(s, JOINED, resumed > 0 and 1 or 0, v)) end
elseif newcomer then
  announce(s, name, event(s, JOINED, 0, 0, member(s, name)))
end
local roster = {}
if kind == 'r' then
  roster[1] = name
  roster[2] = get(s, name .. ':d') or ''
  for _, n in ipairs(names(s)) do
    if n ~= name then
      roster[#roster + 1] = n
      roster[#roster + 1] = get(s, n .. ':d') or ''
    end
  end
end
commit(s)
schedule(s)
local last = kind == 'p' and get(s, name .. ':i') or ''
return reply('ok', created, resumed, peer, peerV, mail, held, last, host(s), roster)
