-- Whether a sender should pause, because much waits for the other seat. KEYS[1]
-- session; ARGV: instance, holder, seat.
local s, name = session(idOf(KEYS[1])), ARGV[3]
local no = refusal(s, name, ARGV[2])
if no then return no end
local held = not isRoom(s) and overfull(s, other(name), ARGV[2])
commit(s)
return reply('ok', held and 1 or 0)
