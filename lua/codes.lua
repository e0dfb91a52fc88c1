-- Forgets expired codes, and answers how many are taken. ARGV: the fewest and the
-- most digits.
local taken, now = 0, string.format('%.0f', clock())
for digits = tonumber(ARGV[1]), tonumber(ARGV[2]) do
  local key = 'parley:codes:' .. digits
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  taken = taken + redis.call('ZCARD', key)
end
return {'ok', taken}
