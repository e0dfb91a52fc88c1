-- Opens a session. KEYS[1] it; ARGV: instance, expires, 1 if it counts to a
-- quota, all that no script needs, and of a room its code, seats, locked and
-- password.
local id = idOf(KEYS[1])
local s = load(id)
if s and not over(s) then return reply('taken') end
if s then finish(s, 'g') end
local code = ARGV[5]
if code then
  local at = call('GET', 'parley:room:' .. code)
  local there = at and load(at)
  if there and not over(there) then return reply('taken') end
  if there then finish(there, 'g') end
end
if MAX_SESSIONS > 0 and call('ZCARD', SESSIONS) >= MAX_SESSIONS then return reply('capacity') end
s = session(id)
s.whole = true
set(s, 'k', code and 'r' or 'p')
begin(s)
set(s, 'L', now())
set(s, 'X', ARGV[2])
set(s, 'I', ARGV[4])
if ARGV[3] == '1' then set(s, 'W', ME) end
if code then
  set(s, 'n', code)
  set(s, 'x', ARGV[6])
  set(s, 'l', ARGV[7])
  set(s, 'p', ARGV[8])
  call('SADD', ROOMS, id)
  call('SET', 'parley:room:' .. code, id, 'PX', math.max(math.ceil((num(s, 'X') - now() + MARGIN) / 1000), 1))
end
commit(s)
schedule(s)
return reply('ok')
