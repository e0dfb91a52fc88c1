-- Queues an event for all who are connected. KEYS[1] session; ARGV: instance,
-- the event.
local s = load(idOf(KEYS[1]))
if not s or over(s) then return reply('gone') end
announce(s, nil, ARGV[2])
commit(s)
return reply('ok')
