-- Gives a seat up. KEYS[1] session; ARGV: instance, holder, seat, 1 if for good.
local s = load(idOf(KEYS[1]))
if not s then return reply('gone') end
local name = ARGV[3]
if holder(s, name) ~= ARGV[2] then return reply('replaced') end
leave(s, name, ARGV[4] == '1')
settle(s)
return reply('ok')
