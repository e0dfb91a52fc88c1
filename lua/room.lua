-- Returns what is known of a session, a room's changed first. KEYS[1] session,
-- or none, parley:{}, where a code is given; ARGV: instance, 1 if it must be a room, seats,
-- locked and password, each "" where it stays, and a code.
local id = idOf(KEYS[1])
if ARGV[6] then id = call('GET', 'parley:room:' .. ARGV[6]) end
local s = id and load(id)
if not s or over(s) then return reply('gone') end
if ARGV[2] == '1' then
  if not isRoom(s) then return reply('gone') end
  if ARGV[3] ~= '' then set(s, 'x', ARGV[3]) end
  if ARGV[4] ~= '' then set(s, 'l', ARGV[4]) end
  if ARGV[5] ~= '' then set(s, 'p', string.sub(ARGV[5], 2)) end
  commit(s)
end
return reply('ok', s.id, get(s, 'k'), taken(s), get(s, 'I') or '', get(s, 'n') or '', num(s, 'x'), get(s, 'l') or '', get(s, 'p') or '')
