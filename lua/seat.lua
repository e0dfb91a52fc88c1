-- What else a seat may do. KEYS[1] session; ARGV: instance, holder, seat, what
-- (held, ack, report), and a number.
local s, name, what, n = session(idOf(KEYS[1])), ARGV[3], ARGV[4], tonumber(ARGV[5])
fetch(s, 'k', name .. ':h')
if not get(s, 'k') then return reply('gone') end
if holder(s, name) ~= ARGV[2] then return reply('replaced') end

if what == 'held' then
  local held = not isRoom(s) and overfull(s, other(name), ARGV[2])
  commit(s)
  return reply('ok', held and 1 or 0)
end

if what == 'ack' then
  if n > lastSeq(s, name) then return reply('beyond') end
  local box = mailbox(s, name)
  if call('XTRIM', box, 'MINID', str(n + 1) .. '-0') > 0 then
    local waits, first = 0, call('XRANGE', box, '-', '+', 'COUNT', 1)[1]
    if first then
      waits = num(s, name .. ':T') - tonumber(first[2][6]) + #first[2][8]
    else
      call('DEL', box)
    end
    count(s, waits - num(s, name .. ':b'))
    set(s, name .. ':b', waits > 0 and waits)
    commit(s)
  end
  return reply('ok')
end

-- A bit for each outcome.
local known, first = num(s, 'O'), 0
if math.floor(known / n) % 2 == 0 then
  first = 1
  set(s, 'O', known + n)
  commit(s)
end
local both = get(s, 'B')
return reply('ok', first, both and now() - tonumber(both) or -1)
