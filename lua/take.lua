-- Takes what waits for a seat. KEYS[1] session; ARGV: instance, holder, seat,
-- the seq after which mail is wanted or "" for none, bytes, and frames.
local s, holding, name, after = session(idOf(KEYS[1])), ARGV[2], ARGV[3], ARGV[4]
local budget, capacity = tonumber(ARGV[5]), tonumber(ARGV[6])
local o = other(name)
fetch(s, 'k', name .. ':h', name .. ':q', name .. ':u', name .. ':w')
if not get(s, 'k') then return reply('gone') end
if holder(s, name) ~= holding then return reply('replaced') end

local frames, bytes, more = {}, 0, false
local function room(size)
  more = #frames >= capacity or bytes > 0 and bytes + size > budget
  bytes = bytes + size
  return not more
end

local key, queued = queue(s, name), num(s, name .. ':q')
local n, size, events = call('LLEN', key), 0, 0
if n > 0 and n <= capacity and queued <= budget then
  frames = call('LRANGE', key, 0, -1)
  call('DEL', key)
  size, bytes, events = queued, queued, num(s, name .. ':u')
else
  for i = 1, n do
    local frame = call('LINDEX', key, 0)
    if not room(sizeOf(frame)) then break end
    frames[i] = call('LPOP', key)
    size = size + sizeOf(frame)
    if isEvent(frame) then events = events + 1 end
  end
end
if size > 0 or #frames > 0 then
  set(s, name .. ':q', queued > size and queued - size)
  if events > 0 then
    local left = num(s, name .. ':u') - events
    set(s, name .. ':u', left > 0 and left)
  end
  count(s, -size)
end

-- Mail stays; its bytes are copied a few entries at a time.
local from = after
while after ~= '' and not more do
  local some = call('XRANGE', mailbox(s, name), '(' .. from .. '-0', '+', 'COUNT', 8)
  for _, entry in ipairs(some) do
    local f = entry[2]
    if not room(#f[8]) then break end
    from = string.match(entry[1], '^%d+')
    frames[#frames + 1] = 'm' .. from .. '\0' .. f[4] .. '\0' .. f[2] .. '\0' .. f[8]
  end
  if #some < 8 then break end
end

if get(s, name .. ':w') and queued - size <= HOLD / 2 then
  set(s, name .. ':w', nil)
  if not isRoom(s) then
    local h = holder(s, o)
    if h then wake(h, 'n') end
  end
end
commit(s)
return reply('ok', more and 1 or 0, frames)
