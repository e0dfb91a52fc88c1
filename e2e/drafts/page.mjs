import { chromium } from "playwright-core"; import crypto from "node:crypto"; import fs from "node:fs";
const base="http://127.0.0.1:18555"; const browser=await chromium.launch({executablePath:"/usr/bin/chromium",args:["--no-sandbox","--disable-features=WebRtcHideLocalIpsWithMdns"]});
const mk=async(o={})=>{const c=await browser.newContext({acceptDownloads:true,...o});await c.addInitScript(()=>{delete window.showSaveFilePicker});const p=await c.newPage();p.on("pageerror",e=>console.log("PAGEERROR",e.message));p.on("console",m=>["error","warning"].includes(m.type())&&console.log("CONSOLE",m.text()));return p};
const phone={viewport:{width:390,height:844}},desk={viewport:{width:1280,height:800}};
const shot=async(p,n)=>{await p.screenshot({path:`/tmp/demo-pw/${n}.png`})};
const both=async(p,n)=>{for(const s of["light","dark"]){await p.emulateMedia({colorScheme:s});await shot(p,`${n}-${s}`)}await p.emulateMedia({colorScheme:"light"})};
const a=await mk(desk),b=await mk(phone);
await a.goto(base+"/?test");await b.goto(base+"/?test");
await both(a,"start-d");await both(b,"start-p");
await b.fill("#code-input","0000");await b.press("#code-input","Enter");await b.waitForSelector("#error:not([hidden])");console.log("wrong:",await b.textContent("#error"));
await a.click("#mint");await a.waitForSelector("#qr svg");await both(a,"code-d");
const code=await a.textContent("#code");console.log("code",code,await a.getAttribute("#code","aria-label"),await a.textContent("#link"));
await b.fill("#code-input",code);await b.press("#code-input","Enter");
await b.waitForSelector("#emoji li");await a.waitForSelector("#emoji li");
const ea=await a.textContent("#emoji"),eb=await b.textContent("#emoji");console.log("emoji same",ea===eb,ea);
await both(a,"compare-d");await both(b,"compare-p");
await a.waitForFunction(()=>document.querySelector("#status").textContent.includes("directly"));
await a.click("#match");await b.click("#match");console.log(await a.textContent("#verified"));
const send=async(from,to,name,n)=>{const buf=crypto.randomBytes(n);fs.writeFileSync("/tmp/demo-pw/"+name,buf);const t=Date.now();await from.setInputFiles("#files","/tmp/demo-pw/"+name);
 const sel=`.transfer[data-direction=in][data-state=done]:has-text("${name}") a[download]`;await to.waitForSelector(sel,{timeout:90000});const ms=Date.now()-t;const[d]=await Promise.all([to.waitForEvent("download"),to.click(sel)]);const got=fs.readFileSync(await d.path());console.log(name,"equal",got.equals(buf),(n/1e6/ms*1000).toFixed(0)+" MB/s", await from.textContent(`.transfer[data-direction=out]:has-text("${name}") .t-note`));};
await send(a,b,"report.pdf",3e6);await send(b,a,"photo of the lake.jpg",5e6);await send(a,b,"empty.txt",0);
fs.writeFileSync("/tmp/demo-pw/big.bin",crypto.randomBytes(400e6));
const t0=Date.now();await a.setInputFiles("#files","/tmp/demo-pw/big.bin");await b.setInputFiles("#files","/tmp/demo-pw/photo of the lake.jpg");await a.waitForTimeout(900);await both(a,"transfer-d");await both(b,"transfer-p");
await b.waitForSelector('.transfer[data-state=done]:has-text("big.bin")',{timeout:120000});console.log("big MB/s",(400/(Date.now()-t0)*1000).toFixed(0));
// cancel by receiver mid-way, then another file
await a.setInputFiles("#files",["/tmp/demo-pw/big.bin","/tmp/demo-pw/report.pdf"]);
await b.click('.transfer[data-state=active]:has-text("big.bin") button');
await b.waitForFunction(()=>document.querySelectorAll('.transfer[data-state=done]').length>=5,null,{timeout:30000});
console.log("states a",await a.$$eval(".transfer",x=>x.map(e=>e.dataset.direction+":"+e.dataset.state+":"+e.querySelector(".t-note").textContent)));
console.log("states b",await b.$$eval(".transfer",x=>x.map(e=>e.dataset.direction+":"+e.dataset.state+":"+e.querySelector(".t-note").textContent)));
await both(b,"done-p");
// bare channel
const bare=await a.evaluate(async()=>{const p=new RTCPeerConnection,q=new RTCPeerConnection;p.onicecandidate=e=>e.candidate&&q.addIceCandidate(e.candidate);q.onicecandidate=e=>e.candidate&&p.addIceCandidate(e.candidate);const c=p.createDataChannel("x");let got=0,dn;const N=400e6,done=new Promise(r=>dn=r);q.ondatachannel=({channel:d})=>{d.binaryType="arraybuffer";d.onmessage=e=>{got+=e.data.byteLength;if(got>=N)dn()}};await p.setLocalDescription();await q.setRemoteDescription(p.localDescription);await q.setLocalDescription();await p.setRemoteDescription(q.localDescription);await new Promise(r=>c.onopen=r);const k=new Uint8Array(65536);c.bufferedAmountLowThreshold=1<<20;const t=performance.now();for(let s=0;s<N;s+=65536){if(c.bufferedAmount>4<<20)await new Promise(r=>c.onbufferedamountlow=r);c.send(k)}await done;return 400/(performance.now()-t)*1000});console.log("bare MB/s (one page)",bare.toFixed(0));
// reload
await b.reload();await b.waitForSelector("#emoji li",{timeout:20000});console.log("after reload:",await b.textContent("#status"),"|",await a.textContent("#status"));
await b.click("#differ");await both(b,"warning-p");await a.waitForTimeout(800);console.log("a after differ:",await a.textContent("#status"));await shot(a,"left-d");
// link
await a.click("#leave");await a.click("#mint");await a.waitForSelector("#qr svg");const link=await a.getAttribute("#link","href");
const c=await mk(phone);await c.goto(link.replace("/#","/?test#"));await c.waitForSelector("#verified:not([hidden])",{timeout:20000});await a.waitForSelector("#verified:not([hidden])");console.log("link:",await a.textContent("#verified"),c.url(),await c.textContent("#status"));await both(c,"room-p");await both(a,"room-d");
// contested + offline
const d=await mk(phone);await d.goto(link);await d.waitForSelector("#error:not([hidden])");console.log("used:",await d.textContent("#error"));await a.waitForTimeout(300);console.log("contested:",await a.textContent("#notice"));await shot(a,"contested-d");await both(d,"error-p");
await d.setViewportSize({width:320,height:640});await d.goto(base+"/");await d.click("#mint");await d.waitForSelector("#qr svg");await d.screenshot({path:"/tmp/demo-pw/code-320.png",fullPage:true});console.log("overflow",await d.evaluate(()=>document.documentElement.scrollWidth));
const p2=await mk(phone);await p2.goto(base+"/");await p2.click("#mint");await p2.waitForSelector("#qr svg");await both(p2,"code-p");
await c.click("#leave");await a.waitForTimeout(500);console.log("a after leave:",await a.textContent("#status"));
await browser.close();
