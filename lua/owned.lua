-- Answers for each session in KEYS whether it is there, and counts to a quota of
-- this instance.
local there = {}
for i, key in ipairs(KEYS) do there[i] = call('HGET', key, 'W') == ME and 1 or 0 end
return reply('ok', there)
