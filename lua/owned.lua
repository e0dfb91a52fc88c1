-- Answers for each session in KEYS whether it is there.
local there = {}
for i, id in ipairs(KEYS) do there[i] = call('EXISTS', 'parley:{' .. id .. '}') end
return reply('ok', there)
