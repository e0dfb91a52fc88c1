-- Mints a code. ARGV: session, life in microseconds, how many redeems have
-- failed, the fewest and the most digits, and random numbers of so many digits:
-- digits, n, n, … It is answered ok, the code and when it expires; digits, and
-- how many the numbers must have; again, if each is taken; or full, and for how
-- long that stays so.
local call = redis.call
local now = clock()
local session, ttl, failures = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local least, most, drawn = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])

local function str(n) return string.format('%.0f', n) end

-- The taken codes of one length, in the order in which they expire.
local function codes(digits) return 'parley:codes:' .. digits end

local function taken(digits)
  call('ZREMRANGEBYSCORE', codes(digits), '-inf', str(now))
  return call('ZCARD', codes(digits))
end

-- A space is full at nine tenths, so that a random number is soon a free one.
local function bound(digits) return 10 ^ digits * 9 / 10 end

local digits
for d = least, most - 1 do
  local size = 10 ^ d
  if taken(d) < size / 100 and failures <= size / 10 then
    digits = d
    break
  end
end
for d = most, least, -1 do
  digits = digits or taken(d) < bound(d) and d
end
if not digits then
  local wait
  for d = least, most do
    local nth = taken(d) - bound(d)
    local at = tonumber(call('ZRANGE', codes(d), nth, nth, 'WITHSCORES')[2])
    if not wait or at - now < wait then wait = at - now end
  end
  return {'full', wait}
end
if digits ~= drawn then return {'digits', digits} end

for i = 7, #ARGV do
  local code = ARGV[i]
  if not call('ZSCORE', codes(digits), code) then
    local expires = now + ttl
    call('ZADD', codes(digits), str(expires), code)
    local life = math.ceil(ttl / 1000) + 1
    if call('PTTL', codes(digits)) < life then call('PEXPIRE', codes(digits), life) end
    call('SET', 'parley:code:' .. code, 'live:' .. session .. ':' .. str(expires), 'PX', life)
    return {'ok', code, expires}
  end
end
return {'again', digits}
