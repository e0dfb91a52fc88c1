-- Answers for each session in KEYS whether it is there.
local there = {}
for i, key in ipairs(KEYS) do there[i] = call('EXISTS', key) end
return reply('ok', there)
