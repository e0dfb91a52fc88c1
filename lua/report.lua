-- Notes an outcome that a seat reports, a bit for each. KEYS[1] session; ARGV:
-- instance, holder, seat, the bit.
local s, name, n = session(idOf(KEYS[1])), ARGV[3], tonumber(ARGV[4])
local no = refusal(s, name, ARGV[2])
if no then return no end
local known, first = num(s, 'O'), 0
if math.floor(known / n) % 2 == 0 then
  first = 1
  set(s, 'O', known + n)
  commit(s)
end
local both = get(s, 'B')
return reply('ok', first, both and now() - tonumber(both) or -1)
