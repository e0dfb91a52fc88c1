-- Trims mail up to a seq. KEYS[1] session; ARGV: instance, holder, seat, seq.
local s, name, n = session(idOf(KEYS[1])), ARGV[3], tonumber(ARGV[4])
local no = refusal(s, name, ARGV[2])
if no then return no end
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
