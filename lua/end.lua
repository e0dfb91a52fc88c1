-- Ends a session. KEYS[1] session; ARGV: instance, why.
local s = load(idOf(KEYS[1]))
if s then finish(s, ARGV[2]) end
return reply('ok')
