-- Gives a seat up. KEYS[1] session; ARGV: instance, holder, seat, 1 if for good.
local s = load(idOf(KEYS[1]))
if not s then return reply('gone') end
local name = ARGV[3]
if holder(s, name) ~= ARGV[2] then
  -- Whose join had no answer does not know where in a room it sits.
  name = nil
  for _, other in ipairs(names(s)) do
    if holder(s, other) == ARGV[2] then name = other end
  end
  if not name then return reply('replaced') end
end
leave(s, name, ARGV[4] == '1')
settle(s)
return reply('ok')
